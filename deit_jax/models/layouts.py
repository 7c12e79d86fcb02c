"""Pins how activations lie in memory, where a compiler left alone is known to choose badly."""

import jax
from jax.experimental.layout import Layout, with_layout_constraint


def row_major(x: jax.Array, *platforms: str) -> jax.Array:
    """Returns x, whose last axis the compiler must keep contiguous; so too x's cotangent.

    XLA chooses the layout of every array inside a program. It may store the residual stream
    [B, N, D] with the batch as the contiguous axis, because one product at the heads likes that:
    then each LayerNorm and each addition of the blocks is a transposing kernel.

    Args:
      x: any array; on a mesh each device's shard of it is meant.
      platforms: where to ask for it ("cuda", "tpu"); elsewhere this is the identity.
    """
    layout = Layout(major_to_minor=tuple(range(x.ndim)))

    def pinned(x: jax.Array) -> jax.Array:
        return with_layout_constraint(x, layout)

    wherever = dict.fromkeys(platforms, pinned)
    return jax.lax.platform_dependent(x, default=lambda x: x, **wherever)
