"""Counts what iterators of batches cost in CPU time, each in a process of its own, in turns.

CPU time is that of the process and of its living workers, read from /proc: Linux only.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from deit_jax.errors import InputError

WARM_UP = 2  # turns that do not count
_QUIET = 0.25  # seconds without work after which everything prefetched is ready
_POLL = 0.05
_IDLE = 0.005  # CPU seconds between two polls that waiting threads may use to look around
_TICKS = os.sysconf("SC_CLK_TCK")


class Cost(NamedTuple):
    """What one iterator needed; seconds are of CPU but where it says otherwise."""

    turns: list[float]  # seconds of every turn that counts
    first: float  # seconds to the first batch, imports and compilation included
    first_wall: float  # the same by the clock
    peak: int  # bytes of memory, workers included


def measure(
    builders: dict[str, Callable[[], Iterator[Any]]],
    *,
    cores: int,
    turns: int,
    batches: int,
) -> dict[str, Cost]:
    """Lets every iterator deliver `batches` batches at a time, and the others wait meanwhile.

    An iterator's turn ends when it has delivered and all it prefetches is ready again: a turn
    costs just so many batches, and nothing is done outside of it.

    Args:
      builders: of the iterators, by name; functions that can be pickled. Iterators never end.
      cores: how many processors all of them share.
      turns: how many count, after WARM_UP that do not.
      batches: what an iterator delivers in a turn.

    Raises:
      InputError: an iterator raised it, or its process ended.
    """
    processors = sorted(os.sched_getaffinity(0))[:cores]
    counted = {name: [] for name in builders}
    with contextlib.ExitStack() as stack:
        runners = {}
        for name, build in builders.items():
            _progress(f"{name}: first batch")
            runners[name] = stack.enter_context(_Runner(name, build, processors))
        for turn in range(-WARM_UP, turns):
            _progress(f"turn {turn + 1} of {turns}" if turn >= 0 else "warming up")
            # To and fro, so that no iterator always follows the same other one.
            for name in list(builders)[:: 1 if turn % 2 else -1]:
                seconds = runners[name].deliver(batches)
                if turn >= 0:
                    counted[name].append(seconds)
        return {
            name: Cost(counted[name], runner.first, runner.first_wall, runner.peak())
            for name, runner in runners.items()
        }


class _Runner:
    """A process with an iterator that waits for its turn."""

    def __init__(self, name: str, build: Callable[[], Iterator[Any]], processors: list[int]):
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, processors))
        begin = time.monotonic()
        self._process.start()
        theirs.close()
        try:
            self.first = self._receive()
        except BaseException:
            self.__exit__()
            raise
        self.first_wall = time.monotonic() - begin

    def __enter__(self) -> "_Runner":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def deliver(self, batches: int) -> float:
        """Takes batches; CPU seconds of that."""
        self._connection.send(batches)
        return self._receive()

    def peak(self) -> int:
        """Bytes of memory so far."""
        self._connection.send(0)
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            raise InputError(f"{self._name}: its process ended; its own report is above") from None
        if isinstance(answer, InputError):
            raise InputError(f"{self._name}: {answer}")
        return answer


def _serve(
    connection: Connection, build: Callable[[], Iterator[Any]], processors: list[int]
) -> None:
    """What the process does: its first batch, then what it is asked for until nobody is there."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with the one that started it
    # Its workers start as they do elsewhere, and not, like itself, by loading everything anew.
    multiprocessing.set_start_method(None, force=True)
    # Before anything is imported that counts processors and starts so many threads.
    os.sched_setaffinity(0, processors)
    try:
        batches = build()
        next(batches)
        connection.send(_cpu_seconds())
        _settled()
        with contextlib.suppress(EOFError, BrokenPipeError):
            while True:
                count = connection.recv()
                if not count:
                    connection.send(_peak_bytes())
                    continue
                before = _cpu_seconds()
                for _ in range(count):
                    next(batches)
                connection.send(_settled() - before)
    except InputError as error:
        connection.send(error)


def _settled() -> float:
    """CPU seconds so far, as soon as nothing more is being prefetched."""
    used, quiet = _cpu_seconds(), 0.0
    while quiet < _QUIET:
        time.sleep(_POLL)
        before, used = used, _cpu_seconds()
        quiet = quiet + _POLL if used - before < _IDLE else 0.0
    return used


def _cpu_seconds() -> float:
    """User and system time of this process and its workers."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        with open(f"/proc/{worker.pid}/stat", encoding="ascii") as file:
            fields = file.read().rpartition(")")[2].split()  # the name in brackets may hold spaces
        total += (int(fields[11]) + int(fields[12])) / _TICKS
    return total


def _peak_bytes() -> int:
    """Largest memory this process and its workers had, pages they share counted for each.

    Not from getrusage, which begins with what the process had before it became this program.
    """
    total = 0
    for worker in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        with open(f"/proc/{worker}/status", encoding="utf-8") as file:
            line = next(line for line in file if line.startswith("VmHWM"))
        total += int(line.split()[1]) * 1024
    return total


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
