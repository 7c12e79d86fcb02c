"""Attention by the fused kernels of cuDNN, on NVIDIA GPUs from Hopper on."""

import jax
import jax.numpy as jnp

from deit_jax.errors import InputError, brief


def attend(num_heads: int, qkv: jax.Array, absent: int = 0) -> jax.Array:
    """Computes softmax attention, [B, N, 3D] → [B, N, D]; its gradients do not repeat to the bit.

    Args:
      num_heads: H.
      qkv: bfloat16, the last axis [q|k|v] × [head] × [hd]. N is even: JAX differentiates no other.
      absent: the last so many rows of an image are no tokens; their result is 0.

    Raises:
      InputError: there is no cuDNN, or it takes no such heads.
    """
    batch, rows, width = qkv.shape
    parts = (x.reshape(batch, rows, num_heads, -1) for x in jnp.split(qkv, 3, axis=-1))
    lengths = jnp.full((batch,), rows - absent, jnp.int32) if absent else None
    lengths = {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
    try:
        out = jax.nn.dot_product_attention(*parts, **lengths, implementation="cudnn")
    except (RuntimeError, NotImplementedError) as error:  # JAX's words for the two
        raise InputError(
            f'attention is "cudnn", which does not work here ({brief(error)}); set attention to '
            '"auto"'
        ) from error
    return out.reshape(batch, rows, width // 3)
