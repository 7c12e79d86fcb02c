"""SIGTERM: one process of a run is told to stop, and all stop after the same step or batch."""

import itertools
import signal
import threading
from typing import ClassVar, Self

from deit_jax import couplings
from deit_jax.console import log
from deit_jax.errors import Preempted
from deit_jax.parallel import hosts

_GO_ON = "stopped; run the same command to go on"
_runs = itertools.count()  # of this process; every process starts the same ones


class StopSignal:
    """Listens for SIGTERM within a `with` block.

    On the main thread only, as Python has it; in any other, signals do what they did before.

    Attributes:
      saves_first: there is something to save. Until then whoever listened before hears the signal,
        too: the command line, which ends at once.
      current: the one that listens, of this process.
    """

    current: ClassVar["StopSignal | None"] = None

    def __init__(self) -> None:
        self.saves_first = False
        self._told = self._posted = False
        self._steps = 0
        self._key = f"deit_jax/stop/{next(_runs)}/"

    def __enter__(self) -> Self:
        self._before = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._tell)
            StopSignal.current = self
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            StopSignal.current = None

    def _tell(self, *signal_and_frame: object) -> None:
        first, self._told = not self._told, True
        if not self.saves_first and callable(self._before):
            self._before(*signal_and_frame)
        if first:
            log(f"{hosts.label()}SIGTERM: saving and stopping after this step or evaluation batch")

    def asked(self) -> bool:
        """Returns whether to stop now; every process asks after every step and evaluation batch.

        True on every process after the same one. Who is told posts the one after its next. No
        process is more than one ahead of another, since each reads what came out of the one before,
        to which all contribute, before it asks again: so everyone finds the post before it gets
        there. Between training and evaluation all of them read what the last one gave.
        """
        self._steps += 1
        if not hosts.several():
            return self._told
        store = couplings.store()
        if self._told and not self._posted:
            self._posted = True
            store.key_value_set(f"{self._key}{hosts.index()}", str(self._steps + 2))
        posts = [int(text) for _, text in store.key_value_dir_get(self._key)]
        return bool(posts) and self._steps >= min(posts)

    def check(self) -> None:
        """Raises Preempted where `asked`."""
        if self.asked():
            raise Preempted(_GO_ON)

    def check_alone(self) -> None:
        """Raises Preempted where this process is told and has no others to agree with."""
        if self._told and not hosts.several():
            raise Preempted(_GO_ON)
