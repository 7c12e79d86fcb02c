"""Times programs side by side: each has a process of its own, and they take turns.

CPU time is that of the process and of its living workers, read from /proc: Linux only.
"""

import contextlib
import math
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from deit_jax.console import log_error

WARM_UP = 2  # rounds that do not count
QUIET = 0.25  # seconds without work after which everything prefetched is ready
_POLL = 0.05
_IDLE = 0.005  # CPU seconds between two polls that waiting threads may use to look around


class Program(NamedTuple):
    """What is timed.

    Attributes:
      run: does so many steps, or takes so many batches, and waits until they are finished.
      facts: what else the report wants to know of it.
      peak_memory: returns the bytes it needed at most so far, None where nobody counts them.
    """

    run: Callable[[int], None]
    facts: dict[str, Any]
    peak_memory: Callable[[], int | None]


class Turn(NamedTuple):
    """Seconds of a turn by the clock and of CPU time on all cores, and the peak memory so far."""

    wall: float
    cpu: float
    peak_memory: int | None


_program: Program  # of this process, where it waits for its turns


class Runner(ProcessPoolExecutor):
    """A process with a program that waits for its turns; a context manager.

    Args:
      name: for the progress on stderr.
      build: makes the program, in its process.
      cores: the processors that the process and its workers may use; None for all.
      deadline: of `time.monotonic`, at which a process that is still at work is killed.

    Attributes:
      facts: those of the program, and `first_s` and `first_cpu_s`, the seconds from the start of
        the process to the end of the first step, imports and compilation included.

    Raises:
      Exception: what the program raises, here and in its turns.
      TimeoutError: the deadline.
    """

    def __init__(
        self,
        name: str,
        build: Callable[[], Program],
        cores: list[int] | None = None,
        deadline: float = math.inf,
    ):
        log_error(f"{name}: starting")
        super().__init__(1, multiprocessing.get_context("spawn"), _prepare, (cores,))
        begin = time.monotonic()
        self._deadline, self._worker = deadline, None
        try:
            self._worker = self._wait(self.submit(os.getpid))
            self.facts: dict[str, Any] = self._wait(self.submit(_start, build))
        except BaseException:
            self.shutdown()
            raise
        self.facts["first_s"] = time.monotonic() - begin

    def turn(self, count: int) -> Turn:
        """Times `count` steps or batches."""
        return self._wait(self.submit(_turn, count))

    def kill(self) -> None:
        """Ends the process, whatever it is doing."""
        if self._worker is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._worker, signal.SIGKILL)

    def _wait(self, future: Future) -> Any:
        left = self._deadline - time.monotonic()
        try:
            return future.result(None if left == math.inf else max(left, 0))
        except (TimeoutError, KeyboardInterrupt):
            if not future.done():  # else it is what the program raised
                self.kill()
            raise


def take_turns(
    runners: dict[str, Runner], *, rounds: int, count: int, deadline: float = math.inf
) -> dict[str, list[Turn]]:
    """Lets every program do `count` steps at a time while the others wait.

    Args:
      runners: the programs by name.
      rounds: that count.
      count: steps in a turn.
      deadline: of `time.monotonic`, after which no further round begins; one is always taken.

    Returns:
      The turns that count, by program; turn k of all programs belongs to round k.
    """
    turns = {name: [] for name in runners}
    for number in range(-WARM_UP, rounds):
        if number > 0 and time.monotonic() > deadline:
            log_error(f"no time for more than {number} of {rounds} rounds")
            break
        log_error(f"round {number + 1} of {rounds}" if number >= 0 else "warming up")
        # To and fro, so that no program always follows the same other one.
        for name in list(runners)[:: -1 if number % 2 else 1]:
            turns[name].append(runners[name].turn(count))
    return {name: taken[WARM_UP:] for name, taken in turns.items()}


def deliver(build: Callable[[], Iterator[Any]]) -> Program:
    """Makes a program of an endless iterator.

    Its turn ends when all that it prefetches is ready again: a turn costs exactly its batches, and
    nothing is done between turns.
    """
    batches = build()

    def run(count: int) -> None:
        for _ in range(count):
            next(batches)
        used, quiet = _cpu_seconds(), 0.0
        while quiet < QUIET:
            time.sleep(_POLL)
            before, used = used, _cpu_seconds()
            quiet = quiet + _POLL if used - before < _IDLE else 0.0

    return Program(run, {}, _peak_bytes)


def _prepare(cores: list[int] | None) -> None:
    """Readies a process before it imports what counts processors and starts as many threads."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends at Ctrl-C without a traceback
    # The program's own workers start as the platform has it, not by loading everything anew.
    multiprocessing.set_start_method(None, force=True)
    if cores:
        os.sched_setaffinity(0, cores)


def _start(build: Callable[[], Program]) -> dict[str, Any]:
    global _program
    _program = build()
    _program.run(1)
    return _program.facts | {"first_cpu_s": _cpu_seconds()}


def _turn(count: int) -> Turn:
    wall, cpu = time.perf_counter(), _cpu_seconds()
    _program.run(count)
    wall, cpu = time.perf_counter() - wall, _cpu_seconds() - cpu
    return Turn(wall, cpu, _program.peak_memory())


def _cpu_seconds() -> float:
    """User and system time of this process and its workers."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        text = Path(f"/proc/{worker.pid}/stat").read_text()
        fields = text.rpartition(")")[2].split()  # the name in brackets may hold spaces
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def _peak_bytes() -> int:
    """The largest memory of this process and its workers, pages they share counted for each.

    Not from getrusage, which begins with what the process had before it became this program.
    """
    total = 0
    for worker in ("self", *(child.pid for child in multiprocessing.active_children())):
        status = Path(f"/proc/{worker}/status").read_text()
        total += int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024
    return total
