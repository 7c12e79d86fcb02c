"""Reads ahead of decoding, by threads of its own: for storage that lets a read wait.

tf.data's own threads are as many as processors. Were they more, the operations of each image would
be spread over them, which costs a fifth of the CPU time.
"""

import collections
import itertools
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import tensorflow as tf

from deit_jax.data.source import Source
from deit_jax.parallel import cpus

_BATCHES = 5  # more than tf.data holds of those that have begun and are not at work

Example = tuple[tf.Tensor, tf.Tensor]


class Ahead:
    """Begins reads and hands out what they have read."""

    def __init__(self, source: Source, threads: int) -> None:
        """Starts the threads; they end with the last reference to this object."""
        self._source, self._threads = source, threads
        self._pool = ThreadPoolExecutor(threads, "read")
        self._reads: collections.OrderedDict[int, Future] = collections.OrderedDict()
        self._numbers = itertools.count()

    def begun(self, entries: tf.data.Dataset) -> tf.data.Dataset:
        """Returns the entries, dicts with an `index`, with the number of a read as `read`.

        As many reads begin at once as there are threads: begun one by one, they would wait for
        tf.data's threads, which wait for the reads.
        """

        @tf.autograph.experimental.do_not_convert
        def begin(entries: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            numbers = tf.numpy_function(self._begin, [entries["index"]], tf.int64)
            return {**entries, "read": tf.ensure_shape(numbers, (None,))}

        return entries.batch(self._threads).map(begin).prefetch(1).unbatch()

    def finish(self, entry: dict[str, tf.Tensor]) -> Example:
        """Returns the image and the label of an entry whose read has begun, as Source.fetch."""
        data = tf.ensure_shape(tf.numpy_function(self._finish, [entry["read"]], tf.string), ())
        return self._source.parse(data, entry["index"])

    def _begin(self, indices: np.ndarray) -> np.ndarray:
        numbers = np.array([next(self._numbers) for _ in indices], np.int64)
        for number, index in zip(numbers.tolist(), indices.tolist(), strict=True):
            if index >= 0:  # else a row without example
                self._reads[number] = self._pool.submit(self._source.read, index)
        # More than can be under way: the oldest are of a stream that was given up.
        while len(self._reads) > _BATCHES * self._threads + 2 * cpus.available():
            self._reads.popitem(last=False)[1].cancel()
        return numbers

    def _finish(self, number: int) -> bytes:
        return self._reads.pop(int(number)).result()


def ahead_of(source: Source, threads: int) -> Ahead | None:
    """Returns what reads a split ahead; None where each image is read as it is decoded.

    Args:
      source: the split.
      threads: `input.read_threads`; 0: those of the source.
    """
    threads = threads or source.read_threads
    return Ahead(source, threads) if threads and source.is_read else None
