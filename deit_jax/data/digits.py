"""scikit-learn's handwritten digits: a data set that needs no files."""

import dataclasses
import importlib.util

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from deit_jax.data.source import Source, fixed_fraction
from deit_jax.errors import InputError
from deit_jax.trees import digest

_EVAL_FRACTION = 0.2


@dataclasses.dataclass(eq=False, kw_only=True)
class DigitsSource(Source):
    """A part of scikit-learn's 1797 grey 8×8 digits."""

    is_read = False
    images: tf.Tensor  # uint8 [n, 8, 8, 3]
    labels: tf.Tensor  # int32 [n]
    rows: np.ndarray  # [n], in scikit-learn's own order

    def fetch(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """See Source."""
        return tf.gather(self.images, index), tf.gather(self.labels, index)

    def fingerprint(self) -> str:
        """Returns a digest of pixels and labels."""
        return digest(self.images, self.labels)

    def example_id(self, index: int) -> str:
        """Returns the row in scikit-learn's own order."""
        return f"digits:{self.rows[index]}"


def open_digits(dataset: ConfigDict, split: str) -> DigitsSource:
    """Opens "train" or "eval" of a fixed stratified split.

    Raises:
      InputError: scikit-learn is missing, or `num_classes` is not 10.
    """
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
    rows = fixed_fraction(labels, _EVAL_FRACTION, seed=1)
    if split == "train":
        rows = np.setdiff1d(np.arange(len(labels)), rows)
        rows = rows[fixed_fraction(labels[rows], dataset.train_fraction)]
    grey = np.rint(digits.images[rows] * (255 / 16)).astype(np.uint8)
    return DigitsSource(
        description=f"scikit-learn digits ({split})",
        num_examples=len(rows),
        num_classes=10,
        class_names=tuple("0123456789"),
        images=tf.constant(np.repeat(grey[..., None], 3, axis=-1)),
        labels=tf.constant(labels[rows], tf.int32),
        rows=rows,
    )
