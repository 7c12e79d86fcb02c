"""Multi-head self-attention, with a backward pass that recomputes the weights."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from deit_jax.errors import InputError
from deit_jax.models import attention_cudnn, attention_tpu
from deit_jax.models.layers import Dropout, Layer, Linear, channels, product
from deit_jax.models.layouts import TILE_ROWS
from deit_jax.models.norms import NORMS
from deit_jax.models.rope import Rotation, rotate
from deit_jax.parallel import devices


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2, 3))
def attend(num_heads: int, qkv: jax.Array, absent: int = 0, alone: bool = False) -> jax.Array:
    """Computes softmax attention, [B, N, 3D] → [B, N, D] in qkv's dtype, softmax in float32.

    The last axis of `qkv` is [q|k|v] × [head] × [hd]; scores are scaled by hd^-0.5. The weights,
    [B, H, N, N], are the largest tensors of a block: the backward pass recomputes them from the
    logarithms of the softmax's sums instead of storing them (as FlashAttention, arXiv 2205.14135,
    section 3.1, but in whole matmuls). Nothing attends to the last `absent` rows of an image.

    XLA may see that the weights of both passes are the same, and store them after all: on GPUs it
    does. `alone` keeps the backward pass to itself, which costs a little time. (On CPUs jax 0.10
    drops the barrier that does so, and memory stays as it is.)
    """
    return _attend_forward(num_heads, qkv, absent, alone)[0]


def _attend_forward(
    num_heads: int, qkv: jax.Array, absent: int, alone: bool = False
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    q, k, v = split_heads(qkv, num_heads, 3)
    scores = attention_scores(q, k, absent)
    largest = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    out = product("bhqk,bhkd->bhqd", (weights / total).astype(v.dtype), v)
    out = merge_heads(out).astype(qkv.dtype)
    return out, (qkv, out, largest + jnp.log(total))


def _attend_backward(
    num_heads: int,
    absent: int,
    alone: bool,
    residuals: tuple[jax.Array, jax.Array, jax.Array],
    grad: jax.Array,
) -> tuple[jax.Array]:
    qkv, out, log_total = residuals
    if alone:  # nothing that follows can be merged with what came before the gradient
        qkv, grad = jax.lax.optimization_barrier((qkv, grad))
    q, k, v = split_heads(qkv, num_heads, 3)
    (grad,) = split_heads(grad.astype(qkv.dtype), num_heads)
    (out,) = split_heads(out, num_heads)
    weights = jnp.exp(attention_scores(q, k, absent) - log_total)
    # Σ_k weights · their gradient, which softmax's derivative subtracts, is also grad · out.
    mean = (grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    scores_grad = weights * (product("bhqd,bhkd->bhqk", grad, v) - mean)
    scores_grad = scores_grad.astype(q.dtype)
    # The scale of the scores is applied here, where there are fewer numbers.
    q_grad = product("bhqk,bhkd->bhqd", scores_grad, k) * q.shape[-1] ** -0.5
    k_grad = product("bhqk,bhqd->bhkd", scores_grad, q) * q.shape[-1] ** -0.5
    v_grad = product("bhqk,bhqd->bhkd", weights.astype(v.dtype), grad)
    grads = [merge_heads(x).astype(qkv.dtype) for x in (q_grad, k_grad, v_grad)]
    return (jnp.concatenate(grads, axis=-1),)


attend.defvjp(_attend_forward, _attend_backward)


def split_heads(x: jax.Array, num_heads: int, parts: int = 1) -> jax.Array:
    """Splits [B, N, parts · H · hd] into [parts, B, H, N, hd]."""
    batch, tokens, width = x.shape
    x = x.reshape(batch, tokens, parts, num_heads, width // (parts * num_heads))
    return x.transpose(2, 0, 3, 1, 4)


def merge_heads(x: jax.Array) -> jax.Array:
    """Merges [B, H, N, hd] into [B, N, H · hd]."""
    batch, num_heads, tokens, width = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, tokens, num_heads * width)


def _pad_parts(weights: jax.Array, absent: int) -> jax.Array:
    """Appends so many zeros to each of q, k and v in the last axis, [q|k|v]."""
    *rows, width = weights.shape
    parts = weights.reshape(*rows, 3, width // 3)
    return jnp.pad(parts, [(0, 0)] * (len(rows) + 1) + [(0, absent)]).reshape(*rows, -1)


def choose(
    implementation: str, tokens: int, num_heads: int, head_dim: int, dtype: DTypeLike
) -> str:
    """Returns how attention of such sequences is computed here, what "auto" stands for."""
    if implementation != "auto":
        return implementation
    on_tpu = devices.platform() == "tpu" and jnp.dtype(dtype) == jnp.bfloat16
    return "pallas" if on_tpu and attention_tpu.pays(tokens, num_heads, head_dim) else "xla"


def absent_rows(chosen: str, tokens: int) -> int:
    """Returns how many rows that are no tokens an image of so many tokens gets in the blocks.

    On TPUs those that fill the last tile of rows, without which `in_rows` would move the stream;
    for cuDNN an even number, as JAX differentiates its attention of no other.
    """
    if chosen == "cudnn":
        return tokens % 2
    on_tpu = chosen == "pallas" or devices.platform() == "tpu"
    return -tokens % TILE_ROWS if on_tpu else 0


def check_kernels(
    implementation: str, tokens: int, num_heads: int, head_dim: int, dtype: DTypeLike
) -> None:
    """Raises InputError where the kernels that are asked for cannot compute such attention."""
    if implementation not in ("pallas", "cudnn"):
        return
    if jnp.dtype(dtype) != jnp.bfloat16:
        raise InputError(
            f'attention is "{implementation}", whose kernels compute in bfloat16, but dtype is '
            f'{dtype}; set attention to "auto"'
        )
    if implementation == "pallas" and not attention_tpu.fits(tokens, num_heads, head_dim):
        raise InputError(
            f'attention is "pallas", whose kernels have no room for {tokens} tokens of {num_heads} '
            f'heads of {head_dim}; set attention to "auto"'
        )


def attention_scores(q: jax.Array, k: jax.Array, absent: int = 0) -> jax.Array:
    """Computes q · k · hd^-0.5 of [B, H, N, hd] and [B, H, M, hd], float32 [B, H, N, M].

    The last `absent` keys are no tokens: the softmax gives them no weight.
    """
    scores = product("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
    if not absent:
        return scores
    tokens = jnp.arange(k.shape[2]) < k.shape[2] - absent
    return jnp.where(channels(tokens, scores), scores, attention_tpu.NO_WEIGHT)


class Sequences(NamedTuple):
    """What the kernels are told of qkv: H, hd, rows of an image, and how many are no tokens."""

    num_heads: int
    head_dim: int
    rows: int
    absent: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend_in_vmem(
    sequences: Sequences, interpret: bool, projected: jax.Array, bias: jax.Array
) -> jax.Array:
    """Computes what `attend` does, by the kernels of attention_tpu where it runs on a TPU.

    Args:
      sequences: what the rows are.
      interpret: elsewhere, too, the kernels run, slowly; else the formulas of `attend`.
      projected: qkv before its bias, float32 [B·N, 3D], with D as `attention_tpu.padded` says.
      bias: float32 [3D]. Its gradient, a sum over all tokens, comes from the kernel as well.

    Returns:
      bfloat16 [B·N, D].
    """
    return _kernel_forward(sequences, interpret, projected, bias)[0]


def _kernel_forward(
    sequences: Sequences, interpret: bool, projected: jax.Array, bias: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    # Rounded before it is divided into images, or XLA for TPUs stores it in float32 as well.
    qkv = (projected + channels(bias, projected)).astype(jnp.bfloat16)
    qkv = qkv.reshape(-1, sequences.rows, qkv.shape[-1])
    kernel = functools.partial(attention_tpu.forward, **_told(sequences))

    def formulas(qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
        heads = qkv.shape[2] // 3 // sequences.head_dim
        out, (_, _, log_total) = _attend_forward(heads, qkv, sequences.absent)
        return out, log_total[..., 0].transpose(0, 2, 1)

    elsewhere = functools.partial(kernel, interpret=True) if interpret else formulas
    out, log_total = jax.lax.platform_dependent(qkv, tpu=kernel, default=elsewhere)
    return out.reshape(-1, out.shape[-1]), (qkv, out, log_total)


def _kernel_backward(
    sequences: Sequences,
    interpret: bool,
    residuals: tuple[jax.Array, jax.Array, jax.Array],
    grad: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    kernel = functools.partial(attention_tpu.backward, **_told(sequences))

    def formulas(
        qkv: jax.Array, out: jax.Array, log_total: jax.Array, grad: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        log_total = log_total.transpose(0, 2, 1)[..., None]
        residuals = qkv, out, log_total
        (qkv_grad,) = _attend_backward(log_total.shape[1], sequences.absent, False, residuals, grad)
        return qkv_grad, qkv_grad.astype(jnp.float32).sum(1)

    elsewhere = functools.partial(kernel, interpret=True) if interpret else formulas
    grad = grad.reshape(residuals[1].shape)
    qkv_grad, sums = jax.lax.platform_dependent(*residuals, grad, tpu=kernel, default=elsewhere)
    return qkv_grad.reshape(-1, qkv_grad.shape[-1]).astype(jnp.float32), sums.sum(0)


def _told(sequences: Sequences) -> dict[str, int]:
    return {name: n for name, n in sequences._asdict().items() if name != "rows"}


attend_in_vmem.defvjp(_kernel_forward, _kernel_backward)


class Attention(Layer):
    """Multi-head self-attention; the fused projection's 3D outputs are [q|k|v] × [head] × [hd].

    `qk_norm` names the norm ("layer" or "rms") of each query and key over its hd channels, one
    scale for all heads; None for none. A rotation (`rope`) comes after it.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        drop_rate: float,
        implementation: str,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: str | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.implementation = implementation
        linear = {"dtype": dtype, "rngs": rngs}
        self.qkv = Linear(dim, 3 * dim, out_dtype=dtype, use_bias=qkv_bias, **linear)
        self.qk_norm = qk_norm is not None
        if self.qk_norm:
            self.q_norm = NORMS[qk_norm](self.head_dim, dtype=jnp.float32)
            self.k_norm = NORMS[qk_norm](self.head_dim, dtype=jnp.float32)
        self.proj = Linear(dim, dim, out_dtype=jnp.float32, use_bias=proj_bias, **linear)
        self.drop = Dropout(drop_rate)

    def __call__(
        self,
        x: jax.Array,
        rngs: nnx.Rngs | None = None,
        rotation: Rotation | None = None,
        *,
        absent: int = 0,
    ) -> jax.Array:
        """Maps [B, N, D] to float32 [B, N, D]; the last `absent` rows of an image are no tokens."""
        chosen = self.chosen(x.shape[1])
        if chosen == "pallas":
            out = self._in_vmem(x, rotation, absent)
        else:
            remat = functools.partial(attend, alone=True)
            ways = {"xla": attend, "xla_remat": remat, "cudnn": attention_cudnn.attend}
            out = self.proj(ways[chosen](self.num_heads, self._qkv(x, rotation), absent))
        return self.drop(out, rngs)

    def chosen(self, tokens: int) -> str:
        """Returns how attention of so many tokens is computed, as `choose` says."""
        dtype = self.qkv.dtype
        return choose(self.implementation, tokens, self.num_heads, self.head_dim, dtype)

    def absent_rows(self, tokens: int) -> int:
        """Returns how many rows that are no tokens an image should get in the blocks."""
        return absent_rows(self.chosen(tokens), tokens)

    def _in_vmem(self, x: jax.Array, rotation: Rotation | None, absent: int) -> jax.Array:
        shape = x.shape
        no_heads = attention_tpu.padded(self.num_heads, self.head_dim) - shape[-1]
        if self.qk_norm or rotation is not None or self.qkv.bias is None:
            # The kernels add the bias; here it has been added, or there is none.
            projected = _pad_parts(self._qkv(x, rotation), no_heads).astype(jnp.float32)
            projected = projected.reshape(-1, projected.shape[-1])
            bias = jnp.zeros(projected.shape[-1:], jnp.float32)
        else:
            kernel = _pad_parts(self.qkv.kernel[...], no_heads)
            if no_heads:
                # Or XLA for TPUs transposes the whole gradient of qkv, to divide the kernel's.
                kernel = jax.lax.optimization_barrier(kernel)
            projected = product("ri,io->ro", x.reshape(-1, shape[-1]), kernel)
            bias = _pad_parts(self.qkv.bias[...], no_heads)
        sequences = Sequences(self.num_heads, self.head_dim, shape[1], absent)
        interpret = devices.platform() != "tpu"
        kernels = functools.partial(attend_in_vmem, sequences, interpret)
        out = devices.on_each(kernels, projected, bias)
        out = product("ri,io->ro", out, jnp.pad(self.proj.kernel[...], ((0, no_heads), (0, 0))))
        out = out if self.proj.bias is None else out + channels(self.proj.bias[...], out)
        return out.reshape(shape)

    def _qkv(self, x: jax.Array, rotation: Rotation | None) -> jax.Array:
        """Returns the projection [B, N, 3D], queries and keys normalised and rotated."""
        qkv = self.qkv(x)
        if not self.qk_norm and rotation is None:
            return qkv

        # Its intermediates in float32 are wider than qkv: the backward pass computes them again.
        @jax.checkpoint
        def prepared(qkv: jax.Array, rotation: Rotation | None) -> jax.Array:
            q, k, v = jnp.split(qkv, 3, axis=-1)
            heads = (*q.shape[:2], self.num_heads, self.head_dim)
            q, k = (part.reshape(heads).astype(jnp.float32) for part in (q, k))
            if self.qk_norm:
                q, k = self.q_norm(q), self.k_norm(k)
            if rotation is not None:
                q, k = rotate(q, rotation), rotate(k, rotation)
            q, k = (part.astype(qkv.dtype).reshape(v.shape) for part in (q, k))
            return jnp.concatenate([q, k, v], axis=-1)

        return prepared(qkv, rotation)

    def weights(self, x: jax.Array, rotation: Rotation | None = None) -> jax.Array:
        """Returns the weights of the values, float32 [B, H, N, N]."""
        q, k, _ = split_heads(self._qkv(x, rotation), self.num_heads, 3)
        return jax.nn.softmax(attention_scores(q, k))

    def largest_logit(self, x: jax.Array, rotation: Rotation | None = None) -> jax.Array:
        """Returns the largest attention logit by magnitude, float32 []."""
        q, k, _ = split_heads(self._qkv(x, rotation), self.num_heads, 3)
        return jnp.abs(attention_scores(q, k)).max()
