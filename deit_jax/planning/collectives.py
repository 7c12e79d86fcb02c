"""Reads from the optimised HLO text of a compiled program what its devices send one another.

The text is not an interface: another XLA may write it in another way. tests/planning has every form
that the compilers for CPU, GPU and TPU have printed so far.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from deit_jax.planning import hlo

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
_OPERATION = re.compile(rf"\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ({_KINDS})(-start)?\(")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_RESULTS = re.compile(r"\(\([^()]*\), (.*)\)$")  # of a type ((operands), results)
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_ONCE = "loop, counted once"  # where the text does not say how often the loop runs


class Collective(NamedTuple):
    """One collective operation.

    Attributes:
      kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute".
      bytes: of the whole array on one device: of the result, for a reduce-scatter of the operand.
      devices: how many take part in each group.
      where: "step", "loop", "loop, counted once" (the text does not say how often it runs) or
        "branch" (does not always run).
      times: how often a step runs it.
    """

    kind: str
    bytes: int
    devices: int
    where: str = "step"
    times: int = 1


def read(text: str, num_devices: int) -> list[Collective]:
    """Returns the collectives of a program, in the order in which it calls them.

    Args:
      text: `compiled.as_text()`.
      num_devices: of the program, for operations that name no groups.
    """
    bodies, entry = hlo.computations(text)
    return list(_visit(bodies, entry, num_devices, "step", 1, set()))


def table(found: list[Collective]) -> list[dict]:
    """Sums operations that are alike: kind, where, devices, and count and bytes in a step."""
    rows: dict[tuple, dict] = {}
    for one in found:
        row = {"kind": one.kind, "where": one.where, "devices": one.devices}
        row = rows.setdefault(tuple(row.values()), row | {"count": 0, "bytes": 0})
        row["count"] += one.times
        row["bytes"] += one.times * one.bytes
    return sorted(rows.values(), key=lambda row: -row["bytes"])


def ring_seconds(found: list[Collective], bytes_per_second: float) -> float:
    """Estimates how long the collectives take one after the other, as rings over their devices."""
    seconds = 0.0
    for one in found:
        share = (one.devices - 1) / one.devices
        rounds = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(one.kind, share)
        seconds += one.times * one.bytes * rounds / bytes_per_second
    return seconds


def _visit(
    bodies: dict[str, list[str]],
    name: str,
    num_devices: int,
    where: str,
    times: int,
    seen: set[tuple[str, str]],
    fused: bool = False,
) -> Iterator[Collective]:
    """Yields the collectives of a computation and of those it calls.

    `seen` holds kind and channel of the collectives in fusions so far: the TPU compiler spreads
    one over several fusions that hide it.
    """
    for line in bodies.get(name, ()):
        if match := _OPERATION.match(line):
            channel = _CHANNEL.search(line)
            part = (match[2], channel[1]) if fused and channel else None
            if part not in seen:
                one = _collective(match, line, num_devices)
                if name.startswith("all-reduce-scatter"):  # how a TPU program writes one
                    one = one._replace(kind="reduce-scatter")
                yield one._replace(where=where, times=times)
            if part is not None:
                seen.add(part)
        for role, names in _CALLED.findall(line):
            place, often = where, times
            if role in ("body", "condition"):
                trips = hlo.trips(bodies, line)
                place, often = (_ONCE, times) if trips is None else ("loop", times * trips)
            elif role.endswith(("computation", "computations")):
                place = "branch"
            for called in re.findall(r"[\w.\-]+", names):
                inside = fused or role == "calls"
                yield from _visit(bodies, called, num_devices, place, often, seen, inside)


def _collective(match: re.Match, line: str, num_devices: int) -> Collective:
    shape, kind, start = match.groups()
    if start and (results := _RESULTS.match(shape)):  # as XLA:GPU writes all of them since 2026
        shape, start = results[1], None
    devices = _group(line) or num_devices
    size = sum(hlo.array_bytes(shape))
    if kind == "reduce-scatter":
        size *= devices
    elif start and kind == "all-gather":  # the type holds the operands too
        size = size * devices // (devices + 1)
    elif start and kind in ("collective-permute", "all-to-all"):  # operands and results
        size //= 2
    return Collective(kind, size, devices)


def _group(line: str) -> int | None:
    """How many devices are in a group, None where the operation names no groups."""
    if groups := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(groups[1])
    if groups := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return groups[1].count(",") + 1
    # mesh['a'=4,'b'=8], perhaps an order of devices, and the axes over which it goes
    if groups := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", groups[2]))
    return None
