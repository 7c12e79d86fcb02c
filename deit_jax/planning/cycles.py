"""Sums the TPU compiler's own estimates of how many cycles the operations of a program take.

They rank programs; they are not a measurement. On v5e they put large products in bfloat16 at 88 to
96 % of the stated peak and element-wise work at 81 % of the memory's bandwidth, and count
reductions double. Of what runs beside the arithmetic they say nothing: it is named, with its bytes.
"""

import re
from collections import Counter
from typing import NamedTuple

from deit_jax.planning import hlo, parts

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_KERNEL = "tpu_custom_call"
_NOTHING = {"ConcatBitcast", "AllocateBuffer"}  # names for what is there already
_NOTHING |= {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "partition-id"}
_SCALARS = 4096  # bytes; an operation on fewer takes no time that counts


class Operation(NamedTuple):
    """An operation of a step.

    Attributes:
      name: in the program.
      kind: its opcode; of a call into another program the target.
      part: of the step, in words.
      backward: whether it is of the backward pass.
      cycles: estimated for all its times; None where the compiler states none.
      bytes: that it writes.
      times: how often a step runs it.
    """

    name: str
    kind: str
    part: str
    backward: bool
    cycles: int | None
    bytes: int
    times: int


def read(
    text: str, kernel_cycles: dict[str, int] | None = None
) -> tuple[list[Operation], list[str]]:
    """Returns the operations of a program, and its loops of unknown length, counted once.

    Args:
      text: `compiled.as_text()`, of any compiler; others than a TPU's state no cycles.
      kernel_cycles: of Pallas kernels by name, for which it states none.
    """
    bodies, entry = hlo.computations(text)
    loops: list[str] = []
    found = [
        _operation(one, kernel_cycles or {})
        for one in hlo.walk(bodies, entry, loops)
        if one.kind not in _NOTHING and not one.kind.endswith("-done")
    ]
    return [one for one in found if one.kind not in _NOTHING], loops


def table(operations: list[Operation]) -> list[dict]:
    """Sums by part of the step: forward and backward cycles, the largest part first."""
    rows: dict[str, dict] = {}
    for one in operations:
        if one.cycles:
            row = rows.setdefault(one.part, {"part": one.part, "forward": 0, "backward": 0})
            row["backward" if one.backward else "forward"] += one.cycles
    return sorted(rows.values(), key=lambda row: -row["forward"] - row["backward"])


def uncounted(operations: list[Operation]) -> list[dict]:
    """Sums by kind what has no estimate and is not a scalar: how often it runs, and its bytes."""
    count, size = Counter(), Counter()
    for one in operations:
        if one.cycles is None and one.bytes > _SCALARS:
            count[one.kind] += one.times
            size[one.kind] += one.times * one.bytes
    return [{"kind": kind, "count": n, "bytes": size[kind]} for kind, n in count.most_common()]


def _operation(one: hlo.Operation, kernel_cycles: dict[str, int]) -> Operation:
    line, kind = one.line, one.kind
    scope, cycles, target = parts.scope(line), _CYCLES.search(line), hlo.TARGET.search(line)
    part = parts.part_of(scope, kind in parts.MOVING)
    arrays = hlo.array_bytes(one.shape)
    if kind.endswith("-start"):  # its type holds the operand, too
        kind, arrays = f"{kind.removesuffix('-start')}, asynchronous", [min(arrays[:2])]
    each = int(cycles[1]) if cycles else None
    if target:
        name = one.name.rstrip(".0123456789")
        kind = f"kernel {name}" if target[1] == _KERNEL else target[1]
        each = kernel_cycles.get(name, each)
    return Operation(
        one.name,
        kind,
        part,
        parts.is_backward(scope),
        None if each is None else one.times * each,
        sum(arrays),
        one.times,
    )
