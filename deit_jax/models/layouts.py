"""Pins how activations lie in memory, where a compiler left alone is known to choose badly."""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from deit_jax.parallel import devices

TILE_ROWS = 8  # of an array in a TPU's memory


def in_rows(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns the residual stream [B, N, D] as [B·N, D] where that makes a block faster.

    XLA for TPUs adds the biases and the branches to large products of two axes in one pass; of
    three axes it stores them in float32 first. Images that are no whole tiles stay as they are:
    they would be moved. On CPUs two axes made a step of DeiT-Ti 7 to 13 % shorter in float32, but 8
    to 10 % longer in bfloat16, where images stay as they are, too (`tools/benchmark.py train`,
    2026-11-29, jax 0.12).

    Args:
      x: the stream, float32.
      dtype: of the operands of its products.
    """
    moves = devices.platform() == "tpu" and x.shape[1] % TILE_ROWS
    slower = devices.platform() == "cpu" and dtype == jnp.bfloat16
    return x if moves or slower else x.reshape(-1, x.shape[-1])


def row_major(x: jax.Array, *platforms: str) -> jax.Array:
    """Returns x, whose last axis the compiler must keep contiguous; so too x's cotangent.

    XLA chooses the layout of every array inside a program. It may store the residual stream
    [B, N, D] with the batch as the contiguous axis, because one product at the heads likes that:
    then each LayerNorm and each addition of the blocks is a transposing kernel. A stream `in_rows`
    has no such axis. Between TPU kernels, which take rows as they are, it is faster unpinned.

    Args:
      x: an array whose first axis is the batch; the layout is that of each device's rows.
      platforms: where to ask for it ("cuda", "tpu"). Elsewhere, and where the devices of the
        program are not known, this is the identity.
    """
    if devices.platform() is None or not platforms:
        return x
    layout = Layout(major_to_minor=tuple(range(x.ndim)))

    def pinned(x: jax.Array) -> jax.Array:
        # XLA of jax 0.10 gathers the batch for a constraint that is not within a device's part.
        return devices.on_each(lambda rows: with_layout_constraint(rows, layout), x)

    wherever = dict.fromkeys(platforms, pinned)
    return jax.lax.platform_dependent(x, default=lambda x: x, **wherever)
