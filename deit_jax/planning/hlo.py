"""Reads the optimised HLO text of a compiled program: its computations, loops and arrays.

The text is not an interface: another XLA may write it in another way.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

TARGET = re.compile(r'custom_call_target="([^"]+)"')  # of a call into another program
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_OPERATION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(([^)]*)")
_BODY = re.compile(r"\b(?:body|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"\b(?:true_computation|false_computation|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_LIMIT = re.compile(r" = s32\[\][^ ]* constant\((\d+)\)")


class Operation(NamedTuple):
    """One line of a program.

    Attributes:
      name: in its computation.
      shape: the text of its result's type.
      kind: its opcode.
      operands: their names.
      line: its whole text.
      computation: the name of the one that it is in.
      times: how often the program runs it.
    """

    name: str
    shape: str
    kind: str
    operands: list[str]
    line: str
    computation: str
    times: int


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of each computation by its name, and the name of the entry."""
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if line[:1] in (" ", "\t"):
            lines.append(line)
        elif match := _COMPUTATION.match(line):
            lines = bodies.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
    return bodies, entry


def trips(bodies: dict[str, list[str]], line: str) -> int | None:
    """Returns how often the loop of a line runs; None where the text does not say.

    A TPU's program says it only by the number that the loop's condition compares with.
    """
    if known := _TRIPS.search(line):
        return int(known[1])
    condition = _CONDITION.search(line)
    lines = bodies.get(condition[1], ()) if condition else ()
    limits = [match[1] for match in map(_LIMIT.search, lines) if match]
    counts = len(limits) == 1 and any("direction=LT" in line for line in lines)
    return int(limits[0]) if counts else None


def operations(bodies: dict[str, list[str]], computation: str) -> dict[str, Operation]:
    """Returns the operations of one computation by their names, in its order."""
    found: dict[str, Operation] = {}
    for line in bodies.get(computation, ()):
        if match := _OPERATION.match(line):
            name, shape, kind, operands = match.groups()
            operands = re.findall(r"%([\w.\-]+)", operands)
            found[name] = Operation(name, shape, kind, operands, line, computation, 1)
    return found


def walk(
    bodies: dict[str, list[str]], computation: str, loops: list[str], times: int = 1
) -> Iterator[Operation]:
    """Yields what a computation runs, in place of loops and calls what these run.

    Args:
      bodies: of the program's computations.
      computation: where to start, the entry.
      loops: gets the names of the loops of unknown length, which are counted once.
      times: how often the computation runs.
    """
    for one in operations(bodies, computation).values():
        if one.kind not in ("while", "call", "conditional"):
            yield one._replace(times=times)
            continue
        often = times
        if one.kind == "while":
            count = trips(bodies, one.line)
            often = times * (count or 1)
            if count is None:
                loops.append(one.name)
        found = _BRANCHES if one.kind == "conditional" else _BODY
        for called in re.findall(r"[\w.\-]+", " ".join(found.findall(one.line))):
            yield from walk(bodies, called, loops, often)


def array_bytes(shape: str) -> list[int]:
    """Returns the bytes of each array in the text of a type, such as `(f32[4,8]{1,0}, s32[])`."""
    return [_bytes(*array) for array in _ARRAY.findall(shape)]


def _bytes(kind: str, shape: str) -> int:
    bits = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])
    return math.prod(int(size) for size in shape.split(",") if size) * bits // 8
