"""scikit-learn's handwritten digits, a data set that needs no files."""

import importlib.util

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from deit_jax.data.source import Source, fixed_fraction, frozen_random
from deit_jax.errors import InputError
from deit_jax.trees import digest

_DIGITS_EVAL_FRACTION = 0.2


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


def open_digits(dataset: ConfigDict, split: str) -> DigitsSource:
    """Opens "train" or "eval"; raises InputError without scikit-learn or for other classes."""
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
