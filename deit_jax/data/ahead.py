"""Reads ahead of decoding, by threads of its own: for storage that lets a read wait.

tf.data's own threads are as many as processors. Were they more, the operations of each image would
be spread over them, which costs a fifth of the CPU time.
"""

import collections
import itertools
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue

import numpy as np
import tensorflow as tf

from deit_jax.data.source import Source
from deit_jax.errors import InputError

_GROUPS = 8  # more than tf.data holds of those that have begun and are not taken

Example = tuple[tf.Tensor, tf.Tensor]


class Ahead:
    """Begins reads, as many at once as there are threads, and hands out what they have read."""

    def __init__(self, source: Source, threads: int) -> None:
        """Starts the threads; they end with the last reference to this object."""
        self._source, self._threads = source, threads
        # Not ThreadPoolExecutor, which holds a lock of the whole process while it takes a task: its
        # garbage collection may end another pipeline, and wait for a thread that wants that lock.
        self._tasks: SimpleQueue = SimpleQueue()
        for number in range(threads):
            work = (self._tasks, source.read)
            threading.Thread(target=_work, args=work, name=f"read_{number}", daemon=True).start()
        weakref.finalize(self, _end, self._tasks, threads)
        self._groups: collections.OrderedDict[int, _Group] = collections.OrderedDict()
        self._numbers = itertools.count()

    def read(self, entries: tf.data.Dataset) -> tf.data.Dataset:
        """Returns the entries, dicts with an `index`, with what was read as `data`.

        That is "" where nothing could be: decoding it fails, and whoever reads it again says why.
        """

        @tf.autograph.experimental.do_not_convert
        def begin(entries: dict[str, tf.Tensor]) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
            return entries, tf.numpy_function(self._begin, [entries["index"]], tf.int64)

        @tf.autograph.experimental.do_not_convert
        def take(entries: dict[str, tf.Tensor], number: tf.Tensor) -> dict[str, tf.Tensor]:
            data = tf.numpy_function(self._take, [number], tf.string)
            return {**entries, "data": tf.ensure_shape(data, (None,))}

        # Two groups are on the way while a third is used. One call into Python serves a whole
        # group: called for each image, it would cost as much as all the rest of reading.
        begun = entries.batch(self._threads).map(begin).prefetch(2)
        return begun.map(take).prefetch(1).unbatch()

    def parse(self, entry: dict[str, tf.Tensor]) -> Example:
        """Returns the image and the label of an entry that was read, as Source.fetch."""
        return self._source.parse(entry["data"], entry["index"])

    def _begin(self, indices: np.ndarray) -> int:
        number = next(self._numbers)
        group = self._groups[number] = _Group(indices)
        for place, index in enumerate(indices.tolist()):
            if index >= 0:  # else a row without example
                self._tasks.put((group, place, index))
        if len(self._groups) > _GROUPS:  # the oldest is of a stream that was given up
            self._groups.popitem(last=False)[1].wanted = False
        return number

    def _take(self, number: int) -> np.ndarray:
        return self._groups.pop(int(number)).wait()


class _Group:
    """Reads that begin together."""

    def __init__(self, indices: np.ndarray):
        self.wanted, self.bug = True, None
        self.done: SimpleQueue = SimpleQueue()  # a place for each that has ended
        self.data = np.full(len(indices), b"", object)
        self._count = int((indices >= 0).sum())

    def wait(self) -> np.ndarray:
        """Returns what was read, "" where nothing could be; raises what is our own bug."""
        for _ in range(self._count):
            self.done.get()
        if self.bug is not None:
            raise self.bug
        return self.data


def _work(tasks: SimpleQueue, read: Callable[[int], bytes]) -> None:
    while (task := tasks.get()) is not None:
        group, place, index = task
        try:
            if group.wanted:
                group.data[place] = read(index)
        except (InputError, OSError, ValueError):
            pass  # as of every example that cannot be used: it is read again, alone
        except Exception as error:
            group.bug = error
        group.done.put(place)


def _end(tasks: SimpleQueue, threads: int) -> None:
    for _ in range(threads):
        tasks.put(None)


def ahead_of(source: Source, threads: int) -> Ahead | None:
    """Returns what reads a split ahead; None where each image is read as it is decoded.

    Args:
      source: the split.
      threads: `input.read_threads`; 0: those of the source.
    """
    threads = threads or source.read_threads
    return Ahead(source, threads) if threads and source.is_read else None
