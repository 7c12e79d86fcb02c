"""Reads the optimised HLO text of a compiled program: its computations, loops and arrays.

The text is not an interface: another XLA may write it in another way.
"""

import math
import re

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_LIMIT = re.compile(r" = s32\[\][^ ]* constant\((\d+)\)")


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


def array_bytes(shape: str) -> list[int]:
    """Returns the bytes of each array in the text of a type, such as `(f32[4,8]{1,0}, s32[])`."""
    return [_bytes(*array) for array in _ARRAY.findall(shape)]


def _bytes(kind: str, shape: str) -> int:
    bits = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])
    return math.prod(int(size) for size in shape.split(",") if size) * bits // 8
