"""Pins how activations lie in memory, where a compiler left alone is known to choose badly."""

import jax
from jax.experimental.layout import Layout, with_layout_constraint

from deit_jax.parallel import devices

TILE_ROWS = 8  # of an array in a TPU's memory


def in_rows(x: jax.Array) -> jax.Array:
    """Returns [B, N, D] as [B·N, D]; as it is where that would move it in a TPU's memory.

    XLA for TPUs adds the biases and the branches to large products of two axes in one pass; of
    three axes it stores them in float32 first.
    """
    if devices.platform() == "tpu" and x.shape[1] % TILE_ROWS:
        return x
    return x.reshape(-1, x.shape[-1])


def row_major(x: jax.Array, *platforms: str) -> jax.Array:
    """Returns x, whose last axis the compiler must keep contiguous; so too x's cotangent.

    XLA chooses the layout of every array inside a program. It may store the residual stream
    [B, N, D] with the batch as the contiguous axis, because one product at the heads likes that:
    then each LayerNorm and each addition of the blocks is a transposing kernel.

    Args:
      x: an array whose first axis is the batch; the layout is that of each device's rows.
      platforms: where to ask for it ("cuda", "tpu"). Elsewhere, and where the devices of the
        program are not known, this is the identity.
    """
    if devices.platform() is None:
        return x
    layout = Layout(major_to_minor=tuple(range(x.ndim)))

    def pinned(x: jax.Array) -> jax.Array:
        # XLA of jax 0.10 gathers the batch for a constraint that is not within a device's part.
        return devices.on_each(lambda rows: with_layout_constraint(rows, layout), x)

    wherever = dict.fromkeys(platforms, pinned)
    return jax.lax.platform_dependent(x, default=lambda x: x, **wherever)
