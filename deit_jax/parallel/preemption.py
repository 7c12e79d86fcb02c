"""SIGTERM: one process of a run is asked to stop, and all of them stop after the same step."""

import contextlib
import os
import select
import signal
import threading
import time
from typing import Self

import jax

from deit_jax.parallel import hosts

_STOP = "stop/"
_BEFORE = -1  # the step of a process that has not finished one
_AT_ONCE_SECONDS = 1  # in which two are one: `timeout` signals the process, then its group
_SECOND_STATUS = 128 + signal.SIGTERM  # of a process that SIGTERM has killed


class StopSignal:
    """Listens for SIGTERM, to this process or to another one of the run, until it is closed.

    The first one is a question that the training loop asks after every step (`asked`). Before the
    first step, when data are opened and programs compiled, nobody asks: the process ends by itself
    then, with status 0, and so does every other one. A second signal, more than
    a second later, ends it at once in any case.

    Needs the main thread; in any other, signals do what they did before.
    """

    def __init__(self) -> None:
        """Starts to listen."""
        self._changed = threading.Condition()
        self._step = _BEFORE  # the last step after which `asked` was called
        self._posted = False  # this process's step, for the others to read
        self._last: int | None = None  # the step to stop after, once all agree
        self._signals, self._first = 0, 0.0  # how many, and when the first one was read
        self._closed = threading.Event()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._on_main_thread = threading.current_thread() is threading.main_thread()
        if self._on_main_thread:
            # A handler alone would wait for the end of a compilation; the byte that the
            # interpreter writes for it does not.
            self._handler = signal.signal(signal.SIGTERM, lambda *_: None)
            self._descriptor = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the signal back."""
        if self._on_main_thread:
            signal.set_wakeup_fd(self._descriptor)
            signal.signal(signal.SIGTERM, self._handler)
        self._closed.set()
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def asked(self, step: int) -> bool:
        """Whether to save and stop after this step; every process asks after every step.

        True on every process after the same step, which is at most a step or two after the signal.
        """
        with self._changed:
            self._step = step
            while self._posted and self._last is None:
                self._changed.wait()
            return self._last is not None and step >= self._last

    def between_runs(self) -> None:
        """Back to before a first step: after the teacher's run, and before the student's.

        Ends the process if the signal came too late for the run that is over.
        """
        with self._changed:
            self._step = _BEFORE
            while self._posted and self._last is None:
                self._changed.wait()
            if self._posted:
                _end_before_a_step()

    def _listen(self) -> None:
        while not self._closed.is_set():
            select.select([self._read], [], [], hosts.POLL_SECONDS)
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is gone
                self._count_signals()
                self._agree()

    def _count_signals(self) -> None:
        if not select.select([self._read], [], [], 0)[0]:
            return
        new, now = os.read(self._read, 64).count(signal.SIGTERM), time.monotonic()
        if new and not self._signals:
            self._signals, self._first = 1, now
        elif new and now > self._first + _AT_ONCE_SECONDS:
            self._signals += new
        if self._signals >= 2:
            hosts.fail(
                "it was stopped at once by a second SIGTERM",
                status=_SECOND_STATUS,
                said=f"{hosts.label()}stopped at once by a second SIGTERM; what was being saved"
                " is lost, and the checkpoint before it is not",
            )

    def _agree(self) -> None:
        """Posts this process's step at the first signal anywhere, and reads the others'.

        The main thread stands still after its next step until all are there, so that none is past
        the step after the last of them. This thread must not wait: the others may need that step.
        """
        if self._last is not None:
            return
        steps = hosts.posted(_STOP)
        if not self._signals and not steps:
            return
        with self._changed:
            if not self._posted:
                if hosts.connected():
                    hosts.post(f"{_STOP}{hosts.index()}", str(self._step))
                self._posted = True
            mine = self._step
        steps = hosts.posted(_STOP) if hosts.connected() else {"": mine}
        if hosts.connected() and len(steps) < hosts.count():
            return
        numbers = [int(step) for step in steps.values()]
        if min(numbers) == _BEFORE:
            _end_before_a_step()
        with self._changed:
            self._last = max(numbers) + 1
            self._changed.notify_all()


def _end_before_a_step() -> None:
    hosts.leave(
        f"deit-jax: {hosts.label()}stopped before the first step; run the same command to "
        "start again"
    )
