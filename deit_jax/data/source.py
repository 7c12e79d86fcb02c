"""What every data set provides: the image and the label at an index, names, and a fingerprint."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from deit_jax import storage
from deit_jax.errors import InputError
from deit_jax.parallel import cpus


@dataclasses.dataclass(eq=False, kw_only=True)
class Source(abc.ABC):
    """One split of a data set, with random access by index."""

    description: str  # what it is and where, for logs and errors
    num_examples: int  # examples are 0 … num_examples-1
    num_classes: int  # labels are 0 … num_classes-1
    class_names: tuple[str, ...]  # one a class, or () where unknown
    notes: tuple[str, ...] = ()  # lines for whoever starts a run: what was assumed or left out
    # What is not data, by reason: names.
    passed_over: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    # Reads at a time, ahead of decoding, where `input.read_threads` is 0; 0: none.
    read_threads: int = 0
    is_read = True  # False: the images are in memory

    @abc.abstractmethod
    def fetch(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Reads the example at an index (scalar int64), also inside a graph.

        Returns:
          An image, as the bytes of its file (scalar string) or as pixels (uint8 [h, w, 3]), and
          its label (scalar int32).
        """

    def read(self, index: int) -> bytes:
        """Reads what `parse` takes, in Python, from any thread; only where `is_read`."""
        raise NotImplementedError

    def parse(self, data: tf.Tensor, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns what `fetch` does, from what `read` has read (a scalar string)."""
        raise NotImplementedError

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Returns a digest of file names, order and labels, 16 hex digits; pixels are not read."""

    @abc.abstractmethod
    def example_id(self, index: int) -> str:
        """Returns the name by which a person finds the example: its file, or split and record."""


def in_python(numbers: tf.Tensor) -> np.ndarray:
    """Returns a tensor's numbers without a copy: TensorFlow takes 0.1 ms to give one of them."""
    return np.asarray(memoryview(numbers))


def read_threads(place: str) -> int:
    """Returns how many reads at a time keep the processors fed: in a bucket many, on disks none.

    A processor works on 800 images a second; where a read takes 50 ms, 40 of them are on the way.
    Thousands of threads cost more than they bring.
    """
    return min(max(64, 40 * cpus.available()), 1024) if storage.is_remote(place) else 0


def count_classes(dataset: ConfigDict, found: int | None, where: str) -> int:
    """Returns `num_classes` of the config, or the number that the data set `where` states.

    Raises:
      InputError: there is neither, or the data set has more.
    """
    wanted = dataset.num_classes
    if not (wanted or found):
        raise InputError(f"{where} does not say how many classes it has; set dataset.num_classes")
    if wanted and found and found > wanted:
        raise InputError(
            f"config.dataset.num_classes is {wanted}, but {where} has {found} classes; set "
            f"{found}, or 0 to infer it"
        )
    return wanted or found


def fixed_fraction(labels: np.ndarray, fraction: float, *, seed: int = 0) -> np.ndarray:
    """Returns the sorted indices of a fixed subset: of each class the fraction, at least one."""
    if fraction == 1:
        return np.arange(len(labels))
    rng = np.random.RandomState(seed)  # NumPy froze its numbers, unlike default_rng's
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        chosen.append(rng.permutation(members)[: max(1, round(fraction * len(members)))])
    return np.sort(np.concatenate(chosen))
