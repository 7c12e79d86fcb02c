"""What the benchmark of a GPU measures, in order of importance, and what still fits its time."""

import collections
import functools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.jax_step import Work

# A kind of program, and the seconds that it is expected to take from its start to the end of its
# first step on a machine with an H200. A guess: the first of each kind corrects it for the others.
START_S = {
    "ours": 50,
    "ours again": 20,  # what an earlier group has compiled comes from the cache
    "torch eager": 20,
    "torch compile": 75,
    "attention": 45,
    "parity": 60,
}


class Entry(NamedTuple):
    """A program, and the rows that come of it.

    Attributes:
      name: in the table.
      kind: of START_S.
      switch: of `switches`, for one of ours; "": as it is.
      attention: `model.attention` of ours.
    """

    name: str
    kind: str
    switch: str = ""
    attention: str = "auto"


class Group(NamedTuple):
    """Programs that take turns (kind "step"), or are compared in another way."""

    name: str
    kind: str
    work: Work
    entries: tuple[Entry, ...]


OURS = Entry("ours", "ours")
CUDNN = Entry("ours, attention in cuDNN", "ours", attention="cudnn")
REMAT = Entry("ours, attention by xla_remat", "ours", attention="xla_remat")
RIVALS = (Entry("torch eager", "torch eager"), Entry("torch compile", "torch compile"))


def groups(batch: int, *, tiny: bool = False) -> list[Group]:
    """Returns everything to measure, the most important first.

    Args:
      batch: images a step.
      tiny: models that a CPU trains in milliseconds, and no torch.compile, which takes a minute
        there: to try the program.
    """

    def work(size: str, *, distilled: bool = False) -> Work:
        token = "_distilled" if distilled else ""
        student, teacher = f"deit_{size}{token}_patch16_224", "regnety_160"
        if tiny:
            student, teacher = f"deit_testing{token}", "regnety_testing"
        return Work("train", student, batch, "bfloat16", teacher if distilled else "")

    def switched(*switches: str) -> tuple[Entry, ...]:
        return (OURS, *(Entry(f"ours, {name}", "ours", switch=name) for name in switches))

    distilled, rivals = functools.partial(work, distilled=True), RIVALS[: 1 if tiny else 2]
    few = work("tiny")._replace(batch=min(batch, 16))  # a CPU has to train them
    both = tuple(Entry(name, "parity") for name in ("device", "cpu"))
    libraries = tuple(Entry(name, "attention") for name in ("jax", "torch"))
    # Attention has 197 tokens without a distillation token, which cuDNN gets padded; with it 198.
    found = [
        Group("parity", "parity", few, both),
        Group("base plain", "step", work("base"), (OURS, CUDNN, *rivals)),
        Group("base distilled", "step", distilled("base"), (OURS, CUDNN, *rivals)),
        Group("attention", "attention", work("base"), libraries),
        Group("small plain", "step", work("small"), (OURS, *rivals)),
        Group("base teacher", "step", distilled("base"), switched("teacher in NCHW")),
        Group("base switches", "step", work("base"), (*switched("layout off", "in 2D"), REMAT)),
        Group("tiny plain", "step", work("tiny"), (OURS, *rivals)),
        Group("small distilled", "step", distilled("small"), (OURS, *rivals)),
        Group("tiny distilled", "step", distilled("tiny"), (OURS, *rivals)),
    ]
    return [one for one in found if not (tiny and one.name.startswith(("small", "tiny")))]


class Place(NamedTuple):
    """How and where to measure.

    Attributes:
      platform: of the device, "gpu" or "cpu".
      cache: folder of what XLA has compiled, so that no program is compiled twice.
      rounds: turns of each program that count.
      turn_s: seconds of a turn of the first program; the others do as many steps.
    """

    platform: str
    cache: str
    rounds: int = 7
    turn_s: float = 0.5


class Budget:
    """Decides what is still begun: what should end in time, by how long its kind has taken so far.

    Args:
      seconds: from now to the deadline.
      clock: of the deadline.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self._clock, self.deadline = clock, clock() + seconds
        self._paces: dict[str, list[float]] = collections.defaultdict(list)
        self._compiled: set[tuple[Work, Entry]] = set()

    def stop(self) -> None:
        """Makes this moment the deadline."""
        self.deadline = self._clock()

    def left(self) -> float:
        """Returns the seconds to the deadline."""
        return self.deadline - self._clock()

    def kind(self, work: Work, entry: Entry) -> str:
        """Returns the kind, of START_S, that a program is by now."""
        known = entry.kind == "ours" and (work, entry) in self._compiled
        return "ours again" if known else entry.kind

    def compiled(self, work: Work, entry: Entry) -> None:
        """Learns that a program need not be compiled again."""
        self._compiled.add((work, entry))

    def expected(self, kind: str) -> float:
        """Returns the seconds until a program of a kind has finished its first step."""
        return START_S[kind] * statistics.median(self._paces[kind] or [1.0])

    def took(self, kind: str, seconds: float) -> None:
        """Learns how long a program of a kind took."""
        self._paces[kind].append(seconds / START_S[kind])

    def refusal(self, kind: str, after: float = 0.0) -> str:
        """Returns why a program is not begun, "" where it is.

        Args:
          kind: of the program.
          after: seconds that its turns take.
        """
        needed, left = self.expected(kind) + after, self.left()
        if needed <= left:
            return ""
        return f"no time: takes about {needed:.0f} s, {max(left, 0):.0f} s are left"
