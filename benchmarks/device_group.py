"""Measures one group of programs of the benchmark of a GPU; what fails is a row with its reason."""

import functools
import math
import multiprocessing
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks import device_parity, device_programs
from benchmarks.device_plan import Budget, Entry, Group, Place
from benchmarks.step import figures
from benchmarks.turns import WARM_UP, Runner, Turn, take_turns
from deit_jax.errors import brief

_LAST_S = 5  # kept for the end of a group

Row = dict[str, Any]
Running = dict[str, Runner]


def measure(group: Group, budget: Budget, place: Place) -> Iterator[Row]:
    """Yields a row for each program of a group, with its figures, its `error` or its `skipped`.

    Args:
      group: what to measure.
      budget: what is not expected to end in time is skipped.
      place: where it is measured.
    """
    here = {"kind": group.kind, "group": group.name}
    if group.kind == "step":
        here |= {name: getattr(group.work, name) for name in ("model", "teacher", "batch", "dtype")}
    running: Running = {}
    try:
        for row in _MEASURES[group.kind](group, budget, place, running):
            yield here | row
    finally:
        for runner in running.values():
            runner.shutdown()


def _start(group: Group, budget: Budget, place: Place, running: Running) -> list[Row]:
    """Starts the programs, adds them to `running`, and returns rows of those that did not start.

    XLA times variants of its kernels while it compiles: only one program of JAX compiles at a time.
    PyTorch, which does not, compiles beside it.
    """
    turns_s = 0.0
    if group.kind == "step":
        rounds = place.rounds + WARM_UP + 1
        turns_s = 1.5 * place.turn_s * rounds * len(group.entries)

    def start(entries: list[Entry]) -> list[Row]:
        rows = []
        for entry in entries:
            kind = budget.kind(group.work, entry)
            reason = budget.refusal(kind, turns_s)
            if reason:
                rows.append({"program": entry.name, "skipped": reason})
                continue
            build = functools.partial(device_programs.build, group, entry, place)
            name = f"{group.name}: {entry.name}"
            try:
                runner = Runner(name, build, deadline=budget.deadline)
            except Exception as error:
                rows.append({"program": entry.name, "error": _reason(error)})
                continue
            budget.took(kind, runner.facts["first_s"])
            budget.compiled(group.work, entry)
            running[entry.name] = runner
        return rows

    lanes: dict[str, list[Entry]] = {}
    for entry in group.entries:
        lane = entry.kind if entry.kind.startswith("torch") else "jax"
        lanes.setdefault(entry.name if group.kind == "parity" else lane, []).append(entry)
    with ThreadPoolExecutor(len(lanes)) as threads:
        try:
            return [row for rows in threads.map(start, lanes.values()) for row in rows]
        except BaseException:  # Ctrl-C: the threads wait for their processes
            budget.stop()
            kill_all()
            raise


def kill_all() -> None:
    """Ends the processes of all programs, whatever they are doing."""
    for child in multiprocessing.active_children():
        child.kill()


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "was still at work when the time was up"
    return brief(error)


class _Lasting:
    """A runner whose failure in a turn, for want of memory say, does not end the others' turns."""

    def __init__(self, runner: Runner):
        self._runner = runner
        self.error = ""

    def turn(self, count: int) -> Turn:
        """Times so many steps; NaN once it has failed."""
        if not self.error:
            try:
                return self._runner.turn(count)
            except Exception as error:
                self.error = _reason(error)
        return Turn(math.nan, math.nan, None)


def _steps(group: Group, budget: Budget, place: Place, running: Running) -> Iterator[Row]:
    yield from _start(group, budget, place, running)
    lasting = {
        entry.name: _Lasting(running[entry.name])
        for entry in group.entries
        if entry.name in running
    }
    if not lasting:
        return
    seconds = next(iter(lasting.values())).turn(1).wall
    count = 1 if math.isnan(seconds) else max(1, min(50, round(place.turn_s / seconds)))
    deadline = budget.deadline - _LAST_S
    turns = take_turns(lasting, rounds=place.rounds, count=count, deadline=deadline)
    facts = next((r.facts for r in running.values() if "flops" in r.facts), None)
    for name, taken in turns.items():
        row = {"program": name, "built_s": running[name].facts["first_s"]}
        row |= {"compile_s": running[name].facts.get("compile_s")}  # of JAX, without its start
        if lasting[name].error:
            yield {"program": name, "error": lasting[name].error}
            continue
        ours = turns.get("ours", taken)
        row |= figures(taken, ours, count, group.work.batch, place.platform == "cpu")
        if math.isnan(row["ours_over_theirs"]) or "ours" not in turns:
            row["ours_over_theirs"] = None
        peak = facts and facts["peak_flops"]
        row["mfu"] = facts["flops"] / (row["step_ms"] / 1e3) / peak if peak else None
        row |= {"rounds": len(taken), "steps_per_round": count}
        row["run_s"] = sum(turn.wall for turn in taken)
        row["spread"] = _spread([turn.wall for turn in taken])
        yield row


def _spread(seconds: list[float]) -> float:
    """The range of the turns, relative to their median."""
    return (max(seconds) - min(seconds)) / statistics.median(seconds)


def _attention(group: Group, budget: Budget, place: Place, running: Running) -> Iterator[Row]:
    for entry in group.entries:  # one after the other: nothing runs beside them
        yield from _start(group._replace(entries=(entry,)), budget, place, running)
        runner = running.pop(entry.name, None)
        if runner is not None:
            yield from runner.facts["cases"]
            runner.shutdown()


def _parity(group: Group, budget: Budget, place: Place, running: Running) -> Iterator[Row]:
    yield from _start(group, budget, place, running)
    if len(running) == len(group.entries):
        yield from device_parity.compare(*(running[entry.name].facts for entry in group.entries))


_MEASURES = {"step": _steps, "attention": _attention, "parity": _parity}
