"""Sums the TPU compiler's own estimates of how many cycles the operations of a program take.

They rank programs; they are not a measurement. On v5e they put large products in bfloat16 at 88 to
96 % of the stated peak and element-wise work at 81 % of the memory's bandwidth, and count
reductions double. Of what runs beside the arithmetic they say nothing: it is named, with its bytes.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from deit_jax.planning import hlo

_OPERATION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NAME = re.compile(r'\bop_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_BODY = re.compile(r"\b(?:body|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"\b(?:true_computation|false_computation|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_PARTS = {  # by the scope in an operation's name; the first match counts
    "teacher": r"/teacher/|\(teacher\)",
    "augmentation": r"/augment/",
    "optimiser, EMA, guard": r"/(?:optimizer|ema|guard)/|^jit\(train_step\)/\w+$",
    "attention": r"/attn/",
    "MLP": r"/mlp/",
    "norms": r"/norm\d?/",
    "embedding": r"/patch_embed/|/pos_embed",
    "heads and loss": r"/head(?:_dist)?/|\(loss\)|/loss/",
}
_MOVING = {"copy", "transpose", "reshape", "reverse", "concatenate"}
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


def read(text: str) -> tuple[list[Operation], list[str]]:
    """Returns the operations of a program, and its loops of unknown length, counted once.

    Args:
      text: `compiled.as_text()`, of any compiler; others than a TPU's state no cycles.
    """
    bodies, entry = hlo.computations(text)
    loops: list[str] = []
    return list(_visit(bodies, entry, 1, loops)), loops


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


def _visit(
    bodies: dict[str, list[str]], name: str, times: int, loops: list[str]
) -> Iterator[Operation]:
    for line in bodies.get(name, ()):
        match = _OPERATION.match(line)
        if match is None or match[3] in _NOTHING or match[3].endswith("-done"):
            continue
        if match[3] in ("while", "call", "conditional"):
            often = times
            if match[3] == "while":
                trips = hlo.trips(bodies, line)
                often = times * (trips or 1)
                if trips is None:
                    loops.append(match[1])
            found = _BRANCHES if match[3] == "conditional" else _BODY
            for called in re.findall(r"[\w.\-]+", " ".join(found.findall(line))):
                yield from _visit(bodies, called, often, loops)
        elif (one := _operation(line, match, times)).kind not in _NOTHING:
            yield one


def _operation(line: str, match: re.Match, times: int) -> Operation:
    name, shape, kind = match.groups()
    scope, cycles, target = _NAME.search(line), _CYCLES.search(line), _TARGET.search(line)
    scope = scope[1] if scope else ""
    part = next((part for part, where in _PARTS.items() if re.search(where, scope)), "other")
    if kind in _MOVING and part != "teacher":
        part = "moving data"
    arrays = hlo.array_bytes(shape)
    if kind.endswith("-start"):  # its type holds the operand, too
        kind, arrays = f"{kind.removesuffix('-start')}, asynchronous", [min(arrays[:2])]
    if target:
        kind = f"kernel {name.rstrip('.0123456789')}" if target[1] == _KERNEL else target[1]
    return Operation(
        name,
        kind,
        part,
        "transpose(" in scope,
        times * int(cycles[1]) if cycles else None,
        sum(arrays),
        times,
    )
