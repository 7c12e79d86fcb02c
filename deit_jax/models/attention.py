"""Multi-head self-attention, with a backward pass that recomputes the weights."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from deit_jax.models.layers import Dropout, Layer, Linear, product


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(num_heads: int, qkv: jax.Array) -> jax.Array:
    """Computes softmax attention, [B, N, 3D] → [B, N, D] in qkv's dtype, softmax in float32.

    The last axis of `qkv` is [q|k|v] × [head] × [hd]; scores are scaled by hd^-0.5. The weights,
    [B, H, N, N], are the largest tensors of a block: the backward pass recomputes them from the
    logarithms of the softmax's sums instead of storing them (as FlashAttention, arXiv 2205.14135,
    section 3.1, but in whole matmuls).
    """
    return _attend_forward(num_heads, qkv)[0]


def _attend_forward(
    num_heads: int, qkv: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    q, k, v = _heads(qkv, num_heads, 3)
    scores = _scores(q, k)
    largest = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    out = product("bhqk,bhkd->bhqd", (weights / total).astype(v.dtype), v)
    out = _merge_heads(out).astype(qkv.dtype)
    return out, (qkv, out, largest + jnp.log(total))


def _attend_backward(
    num_heads: int, residuals: tuple[jax.Array, jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array]:
    qkv, out, log_total = residuals
    q, k, v = _heads(qkv, num_heads, 3)
    (grad,) = _heads(grad.astype(qkv.dtype), num_heads)
    (out,) = _heads(out, num_heads)
    weights = jnp.exp(_scores(q, k) - log_total)
    # Σ_k weights · their gradient, which softmax's derivative subtracts, is also grad · out.
    mean = (grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    scores_grad = weights * (product("bhqd,bhkd->bhqk", grad, v) - mean)
    scores_grad = scores_grad.astype(q.dtype)
    # The scale of the scores is applied here, where there are fewer numbers.
    q_grad = product("bhqk,bhkd->bhqd", scores_grad, k) * q.shape[-1] ** -0.5
    k_grad = product("bhqk,bhqd->bhkd", scores_grad, q) * q.shape[-1] ** -0.5
    v_grad = product("bhqk,bhqd->bhkd", weights.astype(v.dtype), grad)
    grads = [_merge_heads(x).astype(qkv.dtype) for x in (q_grad, k_grad, v_grad)]
    return (jnp.concatenate(grads, axis=-1),)


attend.defvjp(_attend_forward, _attend_backward)


def _heads(x: jax.Array, num_heads: int, parts: int = 1) -> jax.Array:
    """Splits [B, N, parts · H · hd] into [parts, B, H, N, hd]."""
    batch, tokens, width = x.shape
    x = x.reshape(batch, tokens, parts, num_heads, width // (parts * num_heads))
    return x.transpose(2, 0, 3, 1, 4)


def _merge_heads(x: jax.Array) -> jax.Array:
    """Merges [B, H, N, hd] into [B, N, H · hd]."""
    batch, num_heads, tokens, width = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, tokens, num_heads * width)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    return product("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5


class Attention(Layer):
    """Multi-head self-attention; the fused projection's 3D outputs are [q|k|v] × [head] × [hd]."""

    def __init__(
        self, dim: int, num_heads: int, *, drop_rate: float, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, dtype=dtype, out_dtype=dtype, rngs=rngs)
        self.proj = Linear(dim, dim, dtype=dtype, out_dtype=jnp.float32, rngs=rngs)
        self.drop = Dropout(drop_rate)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Maps [B, N, D] to float32 [B, N, D]."""
        out = self.proj(attend(self.num_heads, self.qkv(x)))
        return self.drop(out, rngs)

    def largest_logit(self, x: jax.Array) -> jax.Array:
        """Returns the largest attention logit by magnitude, float32 []."""
        q, k, _ = _heads(self.qkv(x), self.num_heads, 3)
        return jnp.abs(_scores(q, k)).max()
