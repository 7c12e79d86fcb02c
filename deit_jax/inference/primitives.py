"""Rewrites functions into few of JAX's primitives: those that a converter to ONNX knows.

Calls of other functions, with or without derivatives of their own, are written out; a choice by
platform becomes that of any platform; what older versions of JAX lack becomes what they have.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core


def flat(function: Callable[..., Any], *arguments: jax.ShapeDtypeStruct) -> core.ClosedJaxpr:
    """Traces a function that returns a list, and returns its equations without any inner ones.

    Args:
      function: to be traced.
      arguments: the shapes and types of its arguments.
    """
    traced = jax.make_jaxpr(function)(*arguments)
    return jax.make_jaxpr(lambda *values: run(traced, *values))(*arguments)


def run(traced: core.ClosedJaxpr, *arguments: Any) -> list[Any]:
    """Computes traced equations, with `_INSTEAD` where it has something."""
    return _run(traced.jaxpr, traced.consts, arguments)


def _run(jaxpr: core.Jaxpr, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= zip(jaxpr.invars, arguments, strict=True)

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        primitive, read = equation.primitive, [value(atom) for atom in equation.invars]
        # What depends on weights alone, a scale that is reshaped say, is computed here.
        shapes = [x.aval.shape for x in equation.outvars]
        constant = all(isinstance(side, int) for shape in shapes for side in shape)
        constant = constant and not any(isinstance(x, jax.core.Tracer) for x in read)
        called = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        with jax.ensure_compile_time_eval() if constant else contextlib.nullcontext():
            if primitive.name in _INSTEAD:
                results = _INSTEAD[primitive.name](*read, **equation.params)
            elif called is not None:
                closed = called if hasattr(called, "consts") else core.ClosedJaxpr(called, ())
                results = _run(closed.jaxpr, closed.consts, read)
            else:
                results = primitive.bind(*read, **equation.params)
        results = results if primitive.multiple_results else [results]
        values |= zip(equation.outvars, results, strict=True)
    return [value(atom) for atom in jaxpr.outvars]


def _cond(index: Any, *operands: Any, branches: Sequence[core.ClosedJaxpr], **_: Any) -> list[Any]:
    return run(branches[int(index)], *operands)  # the index is _platform_index


def _platform_index(*, platforms: Sequence[Sequence[str] | None], **_: Any) -> np.int32:
    return np.int32(next(i for i, known in enumerate(platforms) if known is None))


def _stack(*arrays: Any, axis: int, **_: Any) -> Any:
    return lax.concatenate([lax.expand_dims(x, [axis]) for x in arrays], axis)


def _unstack(array: Any, *, axis: int, **_: Any) -> list[Any]:
    return [lax.index_in_dim(array, i, axis, keepdims=False) for i in range(array.shape[axis])]


_INSTEAD: dict[str, Callable[..., Any]] = {
    "cond": _cond,
    "platform_index": _platform_index,
    "stack": _stack,
    "stop_gradient": lambda array, **_: array,
    "unstack": _unstack,
}
