"""Attention of short sequences on TPUs: a Pallas kernel for each pass, a whole image in VMEM.

XLA writes the scores, the weights and every head's q, k and v to HBM. Here they never leave the
chip: a program of the kernel reads the [N, 3D] of a few images and writes [N, D], or the gradient.
Heads that share 128 lanes are told apart by multiplying with masks of their lanes: the products run
over all 128, which takes a TPU no longer than over 64. The backward pass recomputes the weights
from the softmax's sums (as FlashAttention, arXiv 2205.14135, section 3.1).
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
_MAX_ROWS = 304  # of queries at a time: longer sequences are divided
_ROW_TILE = 16  # rows of bfloat16 that are stored together
NO_WEIGHT = -1e30  # of a score: its exponential is 0
_MAX_GROUPS = 12  # of 128 lanes, of all images of a program: more keep too much at a time
_SCORES = 6  # arrays of scores that live at a time
_DEFAULT_VMEM, _MAX_VMEM = 16 * 2**20, 32 * 2**20  # bytes for a kernel, of at least 64 MiB a chip

_A_BT = (((1,), (1,)), ((), ()))  # a · bᵀ
_A_B = (((1,), (0,)), ((), ()))  # a · b
_product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)

Ref = object  # an array in VMEM, of which Pallas has no public type


def padded(num_heads: int, head_dim: int) -> int:
    """Returns the width D that the kernels need for so many heads: whole groups of 128 lanes."""
    return -(-num_heads * head_dim // LANES) * LANES


def fits(tokens: int, num_heads: int, head_dim: int) -> bool:
    """Returns whether the kernels take such sequences: heads that divide 128 lanes, in VMEM."""
    width = padded(num_heads, head_dim)
    whole = LANES % head_dim == 0 and head_dim % _ROW_TILE == 0
    return whole and _vmem_bytes(tokens, width) <= _MAX_VMEM


def pays(tokens: int, num_heads: int, head_dim: int) -> bool:
    """Returns whether the kernels are faster than XLA by the compiler's estimate (docs/tpu.md)."""
    return fits(tokens, num_heads, head_dim)


def forward(
    qkv: jax.Array, *, num_heads: int, head_dim: int, absent: int = 0, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Computes the softmax attention of every image.

    Args:
      qkv: bfloat16 [B, N, 3D]; the last axis is [q|k|v] × [head] × [hd], with D as `padded` says;
        zeros where there is room for more heads.
      num_heads: H.
      head_dim: hd, which divides 128; a multiple of 16.
      absent: the last so many rows of an image are no tokens, and none attends to them.
      interpret: runs on any device, slowly.

    Returns:
      The output [B, N, D] in qkv's type, and the logarithms of the softmax's sums, float32
      [B, N, D / hd].
    """
    batch, tokens, width = qkv.shape
    outs = [
        jax.ShapeDtypeStruct((batch, tokens, width // 3), qkv.dtype),
        jax.ShapeDtypeStruct((batch, tokens, width // 3 // head_dim), jnp.float32),
    ]
    kernel = functools.partial(
        _forward_kernel, num_heads=num_heads, head_dim=head_dim, absent=absent
    )
    return _call("attention_forward", kernel, [qkv], outs, products=2, interpret=interpret)


def backward(
    qkv: jax.Array,
    out: jax.Array,
    log_total: jax.Array,
    grad: jax.Array,
    *,
    num_heads: int,
    head_dim: int,
    absent: int = 0,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Computes the gradient of qkv from that of the output, and what `forward` took and returned.

    Returns:
      The gradient, like qkv, and its sums over the tokens of each image, float32 [B, 3D].
    """
    outs = [
        jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
        jax.ShapeDtypeStruct((qkv.shape[0], 1, qkv.shape[2]), jnp.float32),
    ]
    operands = [qkv, out, log_total, grad.astype(qkv.dtype)]
    kernel = functools.partial(
        _backward_kernel, num_heads=num_heads, head_dim=head_dim, absent=absent
    )
    qkv_grad, sums = _call(
        "attention_backward", kernel, operands, outs, products=5, interpret=interpret
    )
    return qkv_grad, sums[:, 0]


def _forward_kernel(
    qkv_ref: Ref, out_ref: Ref, log_total_ref: Ref, *, num_heads: int, head_dim: int, absent: int
) -> None:
    tokens, width = out_ref.shape[1:]
    per_group, chunks = LANES // head_dim, _chunks(tokens)
    to_none = _to_none(tokens, absent)

    def group(number: int | jax.Array, log_totals: list[jax.Array]) -> list[jax.Array]:
        q_lanes, k_lanes, v_lanes = _lanes(number, width)
        heads = _heads(number, num_heads, head_dim)
        k, v = qkv_ref[0, :, k_lanes], qkv_ref[0, :, v_lanes]
        new = []
        for rows, log_total in zip(chunks, log_totals, strict=True):
            q = qkv_ref[0, rows, q_lanes].astype(jnp.float32)
            out = jnp.zeros_like(q)
            for place, own in enumerate(heads):
                scores = _scores(q, own, k, head_dim, to_none)
                largest = scores.max(-1, keepdims=True)
                weights = jnp.exp(scores - largest)
                total = weights.sum(-1, keepdims=True)
                out = jnp.where(own, _product(weights.astype(v.dtype), v, _A_B) / total, out)
                mine = _is_column(log_total, number * per_group + place)
                log_total = jnp.where(mine, largest + jnp.log(total), log_total)
            out_ref[0, rows, q_lanes] = out.astype(out_ref.dtype)
            new.append(log_total)
        return new

    shapes = [(rows.stop - rows.start, log_total_ref.shape[2]) for rows in chunks]
    log_totals = _for_each_group(group, out_ref, [jnp.zeros(x, jnp.float32) for x in shapes])
    for rows, log_total in zip(chunks, log_totals, strict=True):
        log_total_ref[0, rows, :] = log_total


def _backward_kernel(
    qkv_ref: Ref,
    out_ref: Ref,
    log_total_ref: Ref,
    grad_ref: Ref,
    qkv_grad_ref: Ref,
    sums_ref: Ref,
    *,
    num_heads: int,
    head_dim: int,
    absent: int,
) -> None:
    tokens, width = out_ref.shape[1:]
    per_group, scale = LANES // head_dim, head_dim**-0.5
    to_none = _to_none(tokens, absent)

    def group(number: int | jax.Array, _: list[jax.Array]) -> list[jax.Array]:
        q_lanes, k_lanes, v_lanes = _lanes(number, width)
        heads = _heads(number, num_heads, head_dim)
        k, v = qkv_ref[0, :, k_lanes], qkv_ref[0, :, v_lanes]
        k_grads, v_grads, q_sum = [0.0] * len(heads), [0.0] * len(heads), 0.0  # transposed
        for rows in _chunks(tokens):
            q, grad = qkv_ref[0, rows, q_lanes], grad_ref[0, rows, q_lanes]
            wide_q, wide_grad = q.astype(jnp.float32), grad.astype(jnp.float32)
            # These two are transposed, once for all heads, in place of each head's weights.
            q_t, grad_t = q.T, grad.T
            log_total = log_total_ref[0, rows, :]
            along = wide_grad * out_ref[0, rows, q_lanes].astype(jnp.float32)
            q_grad = jnp.zeros_like(wide_q)
            for place, own in enumerate(heads):
                mine = _is_column(log_total, number * per_group + place)
                scores = _scores(wide_q, own, k, head_dim, to_none)
                weights = jnp.exp(scores - _sum_where(mine, log_total))
                weights_grad = _product(_of_head(wide_grad, own, v), v, _A_BT)
                scores_grad = (weights * (weights_grad - _sum_where(own, along))).astype(k.dtype)
                q_grad = jnp.where(own, _product(scores_grad, k, _A_B), q_grad)
                of_head = slice(place * head_dim, (place + 1) * head_dim)
                k_grads[place] += _product(q_t[of_head], scores_grad, _A_B)
                v_grads[place] += _product(grad_t[of_head], weights.astype(v.dtype), _A_B)
            q_grad *= scale
            q_sum += q_grad.sum(0, keepdims=True)
            qkv_grad_ref[0, rows, q_lanes] = q_grad.astype(qkv_grad_ref.dtype)
        sums_ref[0, :, q_lanes] = q_sum
        k_grad, v_grad = _stacked(k_grads).T * scale, _stacked(v_grads).T
        for lanes, x in ((k_lanes, k_grad), (v_lanes, v_grad)):
            sums_ref[0, :, lanes] = x.sum(0, keepdims=True)
            qkv_grad_ref[0, :, lanes] = x.astype(qkv_grad_ref.dtype)
        return []

    _for_each_group(group, out_ref, [])


def _for_each_group(
    group: Callable[[int | jax.Array, list], list], out_ref: Ref, carry: list[jax.Array]
) -> list[jax.Array]:
    """Runs `group` for every 128 lanes of the heads: in a row, which is faster, or in a loop.

    In a row all groups' scores would be kept at once, which long sequences have no room for.
    """
    tokens, width = out_ref.shape[1:]
    if tokens > _MAX_ROWS:
        return jax.lax.fori_loop(0, width // LANES, group, carry)
    for number in range(width // LANES):
        carry = group(number, carry)
    return carry


def _lanes(group: int | jax.Array, width: int) -> list[object]:
    """Returns where a group's q, k and v are in qkv."""
    begins = [group * LANES + part * width for part in range(3)]
    if not isinstance(group, int):
        begins = [pl.multiple_of(begin, LANES) for begin in begins]
    return [pl.ds(begin, LANES) for begin in begins]


def _heads(group: int | jax.Array, num_heads: int, head_dim: int) -> list[jax.Array]:
    """Returns which of a group's lanes each of its heads has, bool [1, 128]."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    heads = [(lane >= b) & (lane < b + head_dim) for b in range(0, LANES, head_dim)]
    return heads[: num_heads - group * len(heads)] if isinstance(group, int) else heads


def _chunks(tokens: int) -> list[slice]:
    """Returns slices of about the same number of rows, whole tiles but the last."""
    count = -(-tokens // _MAX_ROWS)
    rows = -(-tokens // (count * _ROW_TILE)) * _ROW_TILE
    return [slice(begin, min(begin + rows, tokens)) for begin in range(0, tokens, rows)]


def _of_head(x: jax.Array, own: jax.Array, like: jax.Array, *, factor: float = 1.0) -> jax.Array:
    """Returns float32 x times `factor` in the lanes of a head, 0 elsewhere, in the type of `like`.

    By a product, as older TPUs cannot select bfloat16.
    """
    return (x * jnp.where(own, factor, 0.0)).astype(like.dtype)


def _scores(
    q: jax.Array, own: jax.Array, k: jax.Array, head_dim: int, to_none: jax.Array | None
) -> jax.Array:
    """Returns the scaled scores of a head, plus what `_to_none` says."""
    scale = head_dim**-0.5
    if math.frexp(scale)[0] == 0.5:  # a power of two, which rounds nothing
        scores = _product(_of_head(q, own, k, factor=scale), k, _A_BT)
    else:
        scores = _product(_of_head(q, own, k), k, _A_BT) * scale
    return scores if to_none is None else scores + to_none


def _to_none(tokens: int, absent: int) -> jax.Array | None:
    """Returns what to add to scores, [1, N], so that the last `absent` keys have no weight."""
    if not absent:
        return None
    key = jax.lax.broadcasted_iota(jnp.int32, (1, tokens), 1)
    return jnp.where(key < tokens - absent, 0.0, NO_WEIGHT)


def _is_column(x: jax.Array, number: int | jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, (1, x.shape[1]), 1) == number


def _sum_where(mask: jax.Array, x: jax.Array) -> jax.Array:
    return (x * mask.astype(x.dtype)).sum(-1, keepdims=True)


def _stacked(of_heads: Sequence[jax.Array]) -> jax.Array:
    """Returns the heads' arrays [hd, N] as [128, N], with zeros where there are fewer heads."""
    x = jnp.concatenate(of_heads)
    return jnp.pad(x, ((0, LANES - x.shape[0]), (0, 0)))


def _call(
    name: str,
    kernel: functools.partial,
    operands: Sequence[jax.Array],
    outs: Sequence[jax.ShapeDtypeStruct],
    *,
    products: int,
    interpret: bool,
) -> Sequence[jax.Array]:
    """Runs a kernel for each image; `products` are its products of N × N × hd for a head."""
    batch, tokens, width = operands[0].shape
    count = _images(batch, tokens, width // 3)

    def images(x: jax.Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        return pl.BlockSpec((count, *x.shape[1:]), lambda number: (number, 0, 0))

    def each(*refs: Ref) -> None:
        for number in range(count):
            kernel(*(ref.at[pl.ds(number, 1)] for ref in refs))

    num_scores = batch * tokens**2 * kernel.keywords["num_heads"]
    return pl.pallas_call(
        each,
        grid=(batch // count,),
        in_specs=[images(x) for x in operands],
        out_specs=[images(x) for x in outs],
        out_shape=outs,
        cost_estimate=pl.CostEstimate(
            flops=2 * products * num_scores * kernel.keywords["head_dim"],
            transcendentals=num_scores,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*operands, *outs)),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=max(_DEFAULT_VMEM, _vmem_bytes(tokens, width // 3, count)),
        ),
        interpret=interpret,
        name=name,
    )(*operands)


def _images(batch: int, tokens: int, width: int) -> int:
    """Returns how many images a program takes: a power of two that divides the batch, and fits.

    Its first products have no softmax beside them yet, and its last softmax no products: of
    several images in a row this happens once.
    """
    groups, count = width // LANES, 1
    while batch % (2 * count) == 0 and 2 * count * groups <= _MAX_GROUPS:
        if _vmem_bytes(tokens, width, 2 * count) > _DEFAULT_VMEM:
            break
        count *= 2
    return count


def _vmem_bytes(tokens: int, width: int, images: int = 1) -> int:
    """Returns what the backward kernel needs: its images' arrays twice, and one group's scores."""
    image = tokens * (8 * width * 2 + LANES * 4)
    scores = min(tokens, _MAX_ROWS) * (-(-tokens // LANES) * LANES) * 4
    return 2 * images * image + _SCORES * scores
