"""LayerNorm and RMSNorm of the transformers, batch norm of RegNetY; all computed in float32."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from deit_jax.errors import InputError
from deit_jax.models.layers import Layer, Mode, channels
from deit_jax.parallel import axis


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def layer_norm(dtype: DTypeLike, x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Normalises the last axis of x with eps 1e-6, computed in float32 and returned in `dtype`.

    The derivative is written out so that the backward pass keeps x, which the residual stream
    keeps anyway, and two numbers a token. Into bfloat16 the variance takes one pass over x, as the
    mean of squares less the square of the mean: what cancels is far below the rounding of the
    result, while the mean is less than fifty times the deviation.
    """
    return _layer_norm_forward(dtype, x, scale, bias)[0]


def _layer_norm_forward(
    dtype: DTypeLike, x: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    if jnp.dtype(dtype) == jnp.float32:
        variance = jnp.square(wide - mean).mean(-1, keepdims=True)
    else:
        variance = jnp.square(wide).mean(-1, keepdims=True) - jnp.square(mean)
        variance = jnp.maximum(variance, 0.0)
    inverse = jax.lax.rsqrt(variance + 1e-6)
    normalised = (wide - mean) * inverse
    out = normalised * channels(scale, x) + channels(bias, x)
    return out.astype(dtype), (x, mean, inverse, scale)


def _layer_norm_backward(
    dtype: DTypeLike, residuals: tuple[jax.Array, ...], grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, mean, inverse, scale = residuals
    grad = grad.astype(jnp.float32)
    normalised = (x.astype(jnp.float32) - mean) * inverse
    inner = grad * channels(scale, x)
    along = (inner * normalised).mean(-1, keepdims=True)
    x_grad = (inner - inner.mean(-1, keepdims=True) - normalised * along) * inverse
    rows = tuple(range(x.ndim - 1))
    return x_grad.astype(x.dtype), (grad * normalised).sum(rows), grad.sum(rows)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(Layer):
    """The LayerNorm of every ViT here, into the type that its reader takes."""

    def __init__(self, features: int, *, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32))
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis of x."""
        return layer_norm(self.dtype, x, self.scale[...], self.bias[...])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def rms_norm(dtype: DTypeLike, x: jax.Array, scale: jax.Array) -> jax.Array:
    """Divides x by the root mean square of its last axis, eps 1e-6, in float32; into `dtype`.

    As for `layer_norm`, the backward pass keeps x and one number a token.
    """
    return _rms_norm_forward(dtype, x, scale)[0]


def _rms_norm_forward(
    dtype: DTypeLike, x: jax.Array, scale: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6)
    return (wide * inverse * channels(scale, x)).astype(dtype), (x, inverse, scale)


def _rms_norm_backward(
    dtype: DTypeLike, residuals: tuple[jax.Array, ...], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, inverse, scale = residuals
    grad = grad.astype(jnp.float32)
    normalised = x.astype(jnp.float32) * inverse
    inner = grad * channels(scale, x)
    along = (inner * normalised).mean(-1, keepdims=True)
    x_grad = (inner - normalised * along) * inverse
    return x_grad.astype(x.dtype), (grad * normalised).sum(tuple(range(x.ndim - 1)))


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


class RMSNorm(Layer):
    """RMSNorm (arXiv 1910.07467) with a learned scale and no bias."""

    def __init__(self, features: int, *, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32))
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis of x."""
        return rms_norm(self.dtype, x, self.scale[...])


NORMS = {"layer": LayerNorm, "rms": RMSNorm}


class BatchNorm(Mode):
    """Batch norm over [B, H, W, C], computed in float32, with PyTorch's running statistics.

    In training the batch normalises itself with its biased variance, and the running statistics
    move a tenth of the way to the batch's mean and *unbiased* variance (nnx.BatchNorm takes the
    biased one). The batch is the global batch, under `jax.jit` whatever its sharding, under pmap
    with a mean over the devices.
    """

    momentum = 0.1
    epsilon = 1e-5

    def __init__(self, features: int, *, scale_init: float = 1.0):
        self.scale = nnx.Param(jnp.full((features,), scale_init, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros((features,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((features,), jnp.float32))

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Returns float32; training, which needs no `rngs` here, records the batch's statistics."""
        x = x.astype(jnp.float32)
        if self.trains(rngs):
            mean, var = self._batch_statistics(x)
        else:
            mean, var = self.mean[...], self.var[...]
        scale = jax.lax.rsqrt(var + self.epsilon) * self.scale[...]
        return (x - channels(mean, x)) * channels(scale, x) + channels(self.bias[...], x)

    def _batch_statistics(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        count = x.size // x.shape[-1] * axis.count()
        if count < 2:
            raise InputError(
                f"batch norm in training got one value a channel (input shape {x.shape}), "
                "expected at least two: use a larger batch or larger images"
            )
        mean = axis.mean(x.mean((0, 1, 2)))
        var = axis.mean(jnp.square(x - channels(mean, x)).mean((0, 1, 2)))
        # The running statistics are a record, not a path for gradients.
        recorded = jax.lax.stop_gradient((mean, var * (count / (count - 1))))
        for running, new in zip((self.mean, self.var), recorded, strict=True):
            running.set_value(running[...] + self.momentum * (new - running[...]))
        return mean, var
