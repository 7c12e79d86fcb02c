"""SIGTERM: one process of a run is told to stop, and all of them stop after the same step."""

import itertools
import signal
import threading
from typing import Self

from deit_jax import couplings
from deit_jax.console import log
from deit_jax.parallel import hosts

_runs = itertools.count()  # of this process; every process starts the same ones


class StopSignal:
    """Listens for SIGTERM within a `with` block.

    On the main thread only, as Python has it; in any other, signals do what they did before.
    """

    def __init__(self) -> None:
        self._told = self._posted = False
        self._steps = 0
        self._key = f"deit_jax/stop/{next(_runs)}/"

    def __enter__(self) -> Self:
        self._before = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._tell)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _tell(self, *_: object) -> None:
        if not self._told:
            log(f"{hosts.label()}SIGTERM: saving and stopping after the next step")
        self._told = True

    def asked(self) -> bool:
        """Returns whether to save and stop now; every process asks after every step.

        True on every process after the same step. Who is told posts the step after its next one.
        No process is more than one step ahead of another, since each reads the metrics of the step
        before, to which all contribute: so everyone finds the post before it gets there.
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
