"""Variants of the training step that the package does not have, for benchmarks alone.

Each replaces a piece of deit_jax, or sets a flag of XLA, in a process that then builds the step.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax

from deit_jax.errors import InputError
from deit_jax.models import layers, vit

_NCHW = "--xla_gpu_force_conv_nchw=true"


def _layout_off() -> list[Any]:
    """The residual stream as the compiler likes it."""
    return [mock.patch.object(vit, "row_major", lambda x, *platforms: x)]


def _dense_2d() -> list[Any]:
    """Dense layers on [B·N, D] in place of [B, N, D]."""
    dense = layers.Linear.__call__

    def flat(self: layers.Linear, x: jax.Array) -> jax.Array:
        return dense(self, x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)

    return [mock.patch.object(layers.Linear, "__call__", flat)]


def _nchw() -> list[Any]:
    """The teacher's convolutions with the channels before the pixels."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {_NCHW}".strip()
    return [mock.patch.dict(os.environ, {"XLA_FLAGS": flags})]


SWITCHES = {
    "layout off": _layout_off,
    "in 2D": _dense_2d,
    "teacher in NCHW": _nchw,
}


@contextlib.contextmanager
def on(name: str) -> Iterator[None]:
    """Makes the steps that are built and compiled within a variant; "" is none.

    Raises:
      InputError: what it replaces is no longer there.
    """
    with contextlib.ExitStack() as stack:
        try:
            for patch in SWITCHES[name]() if name else ():
                stack.enter_context(patch)
        except AttributeError as error:
            raise InputError(f"the switch {name!r} is older than the package: {error}") from error
        yield
