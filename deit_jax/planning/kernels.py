"""Sums what the kernels of a program for a GPU read, write and multiply, by part of the step.

A kernel is taken to last for the longer of its bytes at the memory's stated bandwidth and its
products at the rate that large ones reach. This ranks programs; nothing was timed. Layouts, fusions
and buffers of a program compiled without a GPU are those it would run with; the tiles of its
products are not, since no autotuner ran. Collectives run beside the kernels and are not among them.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

from deit_jax.planning import hlo, parts
from deit_jax.planning.chips import Chip

_CALLS = re.compile(r"\bcalls=%?([\w.\-]+)")
_CONTRACTED = re.compile(r'lhs_contracting_(?:dims=\{|dimensions": *\[)([\d,"]+)')
_SCORES = re.compile(r'"intermediate_tensor_shape":.*?"dimensions": *\[([\d," ]+)\]')
_FILTER = re.compile(r"dim_labels=\w+_(\w+)->")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_NOTHING = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all"}
_NOTHING |= {"partition-id", "replica-id"}
_CROSSING = re.compile(r"(?:all-|reduce-scatter|collective-|ragged-)[\w\-]*")
_MOVING = parts.MOVING | _NOTHING | {"broadcast", "convert", "slice", "dynamic-slice", "pad"}
_FEW = {"slice", "dynamic-slice", "gather"}  # read no more of an array than they return
_AS_IT_IS = {"bitcast", "reshape", "transpose", "copy"}


class Kernel(NamedTuple):
    """A kernel of a step.

    Attributes:
      kind: "fusion", "product", the target of a call into a library, or the opcode.
      part: of the step, in words.
      backward: whether it is of the backward pass.
      times: how often a step runs it.
      bytes: that it reads and writes, all its times.
      flops: of its products, all its times; None where they are not known.
      seconds: that it takes, all its times, by its bytes alone where `flops` is None.
    """

    kind: str
    part: str
    backward: bool
    times: int
    bytes: int
    flops: float | None
    seconds: float


def read(text: str, chip: Chip) -> tuple[list[Kernel], list[str]]:
    """Returns the kernels of a program, and its loops of unknown length, counted once.

    Args:
      text: `compiled.as_text()`.
      chip: the GPU.
    """
    bodies, entry = hlo.computations(text)
    known = {name: hlo.operations(bodies, name) for name in bodies}
    loops: list[str] = []
    found = []
    for one in hlo.walk(bodies, entry, loops):
        if one.kind in _NOTHING or one.kind.endswith("-done") or _CROSSING.fullmatch(one.kind):
            continue
        if one.kind == "async-start":  # what runs beside the rest, in a computation of its own
            inner = _fused(one, known).values()
            if any(_CROSSING.fullmatch(other.kind) for other in inner):
                continue
        found.append(_kernel(one, known, chip))
    return found, loops


def estimate(text: str, chip: Chip) -> dict:
    """Adds up what the kernels of a program take.

    Args:
      text: `compiled.as_text()`.
      chip: the GPU.

    Returns:
      `seconds`, `mfu` (of the chip's stated rate), `parts` (rows of `table`), `uncounted`, `loops`
      of unknown length, counted once, and of all kernels `count`, `bytes` and `flops`; `rates` are
      the bytes/s and FLOP/s taken.
    """
    found, loops = read(text, chip)
    seconds = sum(one.seconds for one in found)
    flops = sum(one.flops or 0 for one in found)
    return {
        "seconds": seconds,
        "mfu": flops / seconds / (chip.tflops * 1e12),
        "parts": table(found),
        "uncounted": uncounted(found),
        "loops": len(loops),
        "count": sum(one.times for one in found),
        "bytes": sum(one.bytes for one in found),
        "flops": flops,
        "rates": {"bandwidth": chip.bandwidth * 1e9, "products": chip.products * 1e12},
    }


def table(kernels: list[Kernel]) -> list[dict]:
    """Sums by part of the step, the longest first; `forward` and `backward` are seconds."""
    rows: dict[str, dict] = {}
    for one in kernels:
        row = {"part": one.part, "kernels": 0, "bytes": 0, "flops": 0, "forward": 0, "backward": 0}
        row = rows.setdefault(one.part, row)
        row["kernels"] += one.times
        row["bytes"] += one.bytes
        row["flops"] += one.flops or 0
        row["backward" if one.backward else "forward"] += one.seconds
    return sorted(rows.values(), key=lambda row: -row["forward"] - row["backward"])


def uncounted(kernels: list[Kernel]) -> list[dict]:
    """Sums by kind the kernels whose products are not known: how often they run, their bytes."""
    count, size = Counter(), Counter()
    for one in kernels:
        if one.flops is None:
            count[one.kind] += one.times
            size[one.kind] += one.bytes
    return [{"kind": kind, "count": n, "bytes": size[kind]} for kind, n in count.most_common()]


Known = dict[str, dict[str, hlo.Operation]]  # operations by computation and name


def _fused(one: hlo.Operation, known: Known) -> dict[str, hlo.Operation]:
    """The operations of the computation that a fusion is made of, {} for another operation."""
    called = _CALLS.search(one.line)
    return known.get(called[1], {}) if called else {}


def _kernel(one: hlo.Operation, known: Known, chip: Chip) -> Kernel:
    inner = _fused(one, known)
    scopes = (parts.scope(other.line) for other in (one, *reversed(inner.values())))
    scope = next(filter(None, scopes), "")
    kinds = {other.kind for other in inner.values()} or {one.kind}
    part = parts.part_of(scope, kinds <= _MOVING)
    kind, products = one.kind, _products(one, known, chip)
    target = hlo.TARGET.search(one.line)
    if target:
        kind = target[1]
    elif products and products[0]:
        kind = "product"
    size = _read(one, inner, known) + _written(one, inner)
    flops, busy = products or (None, 0.0)
    seconds = max(size / (chip.bandwidth * 1e9), busy)
    return Kernel(
        kind,
        part,
        parts.is_backward(scope),
        one.times,
        one.times * size,
        None if flops is None else one.times * flops,
        one.times * seconds,
    )


def _read(one: hlo.Operation, inner: dict[str, hlo.Operation], known: Known) -> int:
    """The bytes of its operands, of each at most what the operations inside use of it."""
    total = 0
    parameters = {
        int(re.search(r"parameter\((\d+)\)", other.line)[1]): other.name
        for other in inner.values()
        if other.kind == "parameter"
    }
    for place, name in enumerate(one.operands):
        given = known[one.computation].get(name)
        whole = sum(hlo.array_bytes(given.shape)) if given else 0
        total += _used(parameters[place], whole, inner) if place in parameters else whole
    return total


def _used(name: str, whole: int, inner: dict[str, hlo.Operation]) -> int:
    """The bytes of an array inside a fusion that are read there, at most `whole`."""
    users = [other for other in inner.values() if name in other.operands]
    total = 0
    for user in users:
        if user.kind in _FEW:
            total += sum(hlo.array_bytes(user.shape))
        elif user.kind in _AS_IT_IS:
            total += _used(user.name, whole, inner)
        elif user.kind != "dynamic-update-slice" or user.operands[0] != name:  # else in place
            total += whole
    return min(whole, total) if users else whole


def _written(one: hlo.Operation, inner: dict[str, hlo.Operation]) -> int:
    """The bytes of its results; of an array that is updated in place the new ones."""
    total = sum(hlo.array_bytes(one.shape))
    if one.kind == "custom-call" and one.shape.startswith("("):  # not the library's work space
        total = sum(hlo.array_bytes(re.sub(r"\b[us]8\[\d*\]", "", one.shape)))
    for other in inner.values():
        if other.kind == "dynamic-update-slice":
            update = inner[other.operands[1]]
            total += sum(hlo.array_bytes(update.shape)) - sum(hlo.array_bytes(other.shape))
    return max(total, 0)


def _products(one: hlo.Operation, known: Known, chip: Chip) -> tuple[float, float] | None:
    """FLOPs and seconds of the products in an operation; None for an unknown library call."""
    flops = seconds = 0.0
    inner = _fused(one, known)
    for other in inner.values():
        if found := _products(other, known, chip):
            flops, seconds = flops + found[0], seconds + found[1]
    if inner or one.kind not in ("dot", "convolution", "custom-call"):
        return flops, seconds
    around = known[one.computation]
    given = [_dims(around[name].shape) for name in one.operands if name in around]
    count = _count(one, given)
    if count is None:
        return None
    kind = _ARRAY.search(around[one.operands[0]].shape)[1]
    return count, count / (chip.products * 1e12 * _speed(kind, one.line))


def _speed(kind: str, line: str) -> float:
    """How fast operands of this type are multiplied, beside bfloat16."""
    if kind != "f32":
        return 1.0
    exact = "highest" in line or '"HIGHEST"' in line
    return 1 / 15 if exact else 1 / 2  # outside the tensor cores, or as TF32


def _count(one: hlo.Operation, given: list[list[int]]) -> float | None:
    """FLOPs of a product; None where its kind is not known."""
    target = hlo.TARGET.search(one.line)
    target = target[1] if target else one.kind
    out = _dims(one.shape)
    if target == "dot" or "matmul" in target or "gemm" in target:
        contracted = re.findall(r"\d+", _CONTRACTED.search(one.line)[1])
        return 2.0 * math.prod(out) * math.prod(given[0][int(axis)] for axis in contracted)
    if target in ("convolution", "__cudnn$convForward", "__cudnn$convBiasActivationForward"):
        outputs = given[1][_FILTER.search(one.line)[1].index("o")]
        return 2.0 * math.prod(out) * math.prod(given[1]) / outputs
    if "fmha" in target and (scores := _SCORES.search(one.line)):
        scores = [int(size) for size in re.findall(r"\d+", scores[1])]
        width = math.prod(given[0]) / math.prod(scores[:3])
        return (10.0 if "Backward" in target else 4.0) * math.prod(scores) * width
    return None


def _dims(shape: str) -> list[int]:
    """The sides of the first array in the text of a type."""
    match = _ARRAY.search(shape)
    return [int(size) for size in match[2].split(",") if size] if match else []
