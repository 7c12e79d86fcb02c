"""Sources: random access from a position in a split to (image, label)."""

import abc

import numpy as np
import tensorflow as tf


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
