"""Sources: random access from a position in a split to (image, label)."""

import abc
import importlib.util

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from deit_jax.errors import InputError
from deit_jax.trees import digest

SPLITS = ("train", "eval")
_DIGITS_EVAL_FRACTION = 0.2


class Source(abc.ABC):
    """One split of a data set, with random access by index.

    Attributes:
      description: what it is and where, for logs and errors.
      num_examples: examples are 0 … num_examples-1.
      num_classes: labels are 0 … num_classes-1.
      class_names: one name a class, or () when unknown.
      encoded: whether `fetch` gives the bytes of an image file rather than decoded pixels.
    """

    def __init__(
        self,
        *,
        description: str,
        num_examples: int,
        num_classes: int,
        class_names: tuple[str, ...],
        encoded: bool,
    ) -> None:
        self.description = description
        self.num_examples = num_examples
        self.num_classes = num_classes
        self.class_names = class_names
        self.encoded = encoded

    @abc.abstractmethod
    def fetch(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """(file bytes or uint8 [h, w, 3], int32 label) of a scalar int64 index; works in graphs."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """16 hex digits, other ones for other files, another order or other labels.

        Of what opening has read: it reads no images, and tells no other pixels of the same size.
        """

    @abc.abstractmethod
    def example_id(self, index: int) -> str:
        """The name a person finds the example by: its file, or split and record number."""


def open_source(dataset: ConfigDict, split: str) -> Source:
    """Opens a split of the data set that the `dataset` group of a config describes.

    Args:
      dataset: the group.
      split: "train" or "eval"; `train_split` and `eval_split` say what they are called.

    Raises:
      InputError: the data are not where the config says, or are not what it says.
    """
    if split not in SPLITS:
        raise InputError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    fraction = dataset.train_fraction
    if not 0 < fraction <= 1:
        raise InputError(
            f"config.dataset.train_fraction is {fraction}, expected a number in (0, 1]"
        )
    # Imported by need: the other sources should not wait for tensorflow_datasets.
    if dataset.source == "folder":
        from deit_jax.data.folder_source import open_folder

        return open_folder(dataset, split)
    if dataset.source == "tfds":
        from deit_jax.data.tfds_source import open_tfds

        return open_tfds(dataset, split)
    if dataset.source == "digits":
        return _open_digits(dataset, split)
    raise InputError(
        f"config.dataset.source is {dataset.source!r}, expected one of folder, tfds, digits"
    )


def frozen_random(seed: int) -> np.random.RandomState:
    """A generator for fixed splits and subsets: NumPy froze its numbers, unlike default_rng's."""
    return np.random.RandomState(seed)


def fixed_fraction(labels: np.ndarray, fraction: float) -> np.ndarray:
    """Sorted indices of a fixed subset: of every class the fraction, rounded, and at least one."""
    if fraction == 1:
        return np.arange(len(labels))
    rng = frozen_random(0)
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        chosen.append(rng.permutation(members)[: max(1, round(fraction * len(members)))])
    return np.sort(np.concatenate(chosen))


class DigitsSource(Source):
    """scikit-learn's 1797 grey 8×8 digits, with a fixed stratified split; needs no files."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, numbers: np.ndarray, split: str):
        super().__init__(
            description=f"scikit-learn digits ({split})",
            num_examples=len(labels),
            num_classes=10,
            class_names=tuple("0123456789"),
            encoded=False,
        )
        self._images = tf.constant(images)
        self._labels = tf.constant(labels, tf.int32)
        self._numbers = numbers

    def fetch(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """See Source."""
        return tf.gather(self._images, index), tf.gather(self._labels, index)

    def fingerprint(self) -> str:
        """See Source."""
        return digest(self._images, self._labels)

    def example_id(self, index: int) -> str:
        """The row in scikit-learn's own order."""
        return f"digits:{self._numbers[index]}"


def _open_digits(dataset: ConfigDict, split: str) -> DigitsSource:
    if dataset.num_classes not in (0, 10):
        raise InputError(
            f"config.dataset.num_classes is {dataset.num_classes}, but the digits have 10 classes; "
            "set 10, or 0 to infer it"
        )
    if importlib.util.find_spec("sklearn") is None:
        raise InputError(
            "config.dataset.source is 'digits', which needs scikit-learn; "
            "install it with: pip install 'deit-jax[demo]'"
        )
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = digits.target
    held_out = np.zeros(len(labels), bool)
    rng = frozen_random(1)
    for label in range(10):
        members = rng.permutation(np.flatnonzero(labels == label))
        held_out[members[: round(_DIGITS_EVAL_FRACTION * len(members))]] = True
    numbers = np.flatnonzero(held_out if split == "eval" else ~held_out)
    if split == "train":
        numbers = numbers[fixed_fraction(labels[numbers], dataset.train_fraction)]
    grey = np.rint(digits.images[numbers] * (255 / 16)).astype(np.uint8)
    return DigitsSource(np.repeat(grey[..., None], 3, axis=-1), labels[numbers], numbers, split)
