"""Building blocks of the vision transformers.

Conventions shared by all modules here. Parameters are float32; `dtype` is the type of the operands
of matrix products, which always accumulate in float32. No module stores random state: a call with
`rngs` is training, one without is evaluation ("no rngs, no noise"), until `model.train()` or
`model.eval()` of NNX says which it is (`Mode`).
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from deit_jax.errors import InputError
from deit_jax.parallel import axis


class Layer(nnx.Module):
    """A module whose calls profiles show under its name in the model, as `blocks/0/attn/qkv`.

    The name comes from the attribute, or the place in an `nnx.List`, that a parent gives it.
    """

    scope = ""

    def __init_subclass__(cls, **options: bool):
        super().__init_subclass__(**options)
        call = vars(cls).get("__call__")
        if call is None:
            return

        @functools.wraps(call)
        def named(self: Layer, *args: object, **kwargs: object) -> jax.Array:
            with jax.named_scope(self.scope or cls.__name__):
                return call(self, *args, **kwargs)

        cls.__call__ = named

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, Layer):
            value.scope = name
        elif isinstance(value, nnx.List):
            for place, layer in enumerate(value):
                layer.scope = f"{name}/{place}"
        super().__setattr__(name, value)


class Mode(Layer):
    """A layer that computes something else in training than in evaluation.

    Until `model.train()` or `model.eval()` is called, a call with `rngs` is training and one
    without is evaluation. Then these decide, as for NNX's own layers: training without the `rngs`
    that it draws from is an error, and evaluation ignores them. So does `nnx.view`.
    """

    deterministic: bool | None = None  # what train() and eval() set

    def set_view(self, deterministic: bool | None = None) -> None:
        """Sets the mode of a view.

        Args:
          deterministic: True for evaluation, False for training; None keeps what is set.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def trains(self, rngs: nnx.Rngs | None) -> bool:
        """Returns whether a call with these `rngs` is training."""
        return rngs is not None if self.deterministic is None else not self.deterministic

    def noise(self, rngs: nnx.Rngs | None) -> jax.Array:
        """Returns a key to draw from; raises InputError without `rngs`."""
        if rngs is None:
            raise InputError(
                f"{self.scope or type(self).__name__} is in training (model.train()) but got no "
                "rngs to draw from: pass rngs=nnx.Rngs(dropout=key), or call model.eval() first"
            )
        return rngs.dropout()


def channels(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Returns a vector [C] in the shape [1,...,1,C] that broadcasts over the last axis of x."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def precision_of(dtype: DTypeLike) -> jax.lax.Precision | None:
    """Returns the precision to multiply operands of this type with.

    float32 is float32 everywhere: accelerators would take bfloat16 or TF32 for it. None, which
    leaves the choice to them, where `jax.default_matmul_precision` has been set.
    """
    full = jnp.dtype(dtype) == jnp.float32 and jax.config.jax_default_matmul_precision is None
    return jax.lax.Precision.HIGHEST if full else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Two-operand einsum computed in x's dtype, accumulated and returned in float32.

    `y` is cast to x's dtype. In the backward pass the incoming gradient is rounded to x's dtype
    too, so that in bfloat16 all three products run on bfloat16 operands; each gradient comes
    back in the dtype of its own operand, float32 for a float32 kernel. Left to autodiff, the
    float32 output would make both backward products float32.
    `spec` must name every axis and sum over no axis that appears in one operand only.
    """
    how = {"precision": precision_of(x.dtype), "preferred_element_type": jnp.float32}
    return jnp.einsum(spec, x, y.astype(x.dtype), **how)


def _product_forward(
    spec: str, x: jax.Array, y: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(spec, x, y), (x, y)


def _product_backward(
    spec: str, operands: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, y = operands
    inputs, out = spec.split("->")
    x_axes, y_axes = inputs.split(",")
    grad = grad.astype(x.dtype)
    x_grad = product(f"{out},{y_axes}->{x_axes}", grad, y)
    y_grad = product(f"{x_axes},{out}->{y_axes}", x, grad)
    return x_grad.astype(x.dtype), y_grad.astype(y.dtype)


product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, x·Φ(x), computed in float32 and returned in x's dtype.

    The derivative is written out so that the backward pass keeps x alone, in x's dtype, instead
    of several float32 intermediates of the widest activation of the network.
    """
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gelu(x), x


def _gelu_backward(x: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * jnp.square(wide)) / math.sqrt(2.0 * math.pi)
    derivative = _normal_cdf(wide) + wide * density
    return ((grad.astype(jnp.float32) * derivative).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


def normal_param(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> nnx.Param:
    """Returns a parameter drawn from N(0, std²), not truncated.

    The reference's trunc_normal_(std=0.02) cuts at ±2.0, a hundred standard deviations away,
    where JAX's truncated normal cuts at two.
    """
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


class Linear(Layer):
    """Dense layer [B, N, I] → [B, N, O] or [B, I] → [B, O] with weights from N(0, 0.02²).

    `out_dtype` is the type of the output: `dtype` between two products, float32 where the result
    joins the residual stream or is a logit. Without `use_bias`, `bias` is None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype: DTypeLike,
        out_dtype: DTypeLike,
        std: float = 0.02,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        self.kernel = normal_param(rngs, (in_features, out_features), std)
        self.bias = nnx.Param(jnp.zeros((out_features,), jnp.float32)) if use_bias else None
        self.dtype = jnp.dtype(dtype)
        self.out_dtype = jnp.dtype(out_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer to the last axis of x."""
        batch = "bn"[: x.ndim - 1]
        y = product(f"{batch}i,io->{batch}o", x.astype(self.dtype), self.kernel[...])
        if self.bias is not None:
            y = y + channels(self.bias[...], y)
        return y.astype(self.out_dtype)


class _PatchProjection(nnx.Module):
    """The patch convolution's parameters, initialised as PyTorch initialises a convolution."""

    def __init__(self, patch_size: int, embed_dim: int, *, rngs: nnx.Rngs):
        bound = 1.0 / math.sqrt(3 * patch_size**2)
        uniform = functools.partial(
            jax.random.uniform, dtype=jnp.float32, minval=-bound, maxval=bound
        )
        self.kernel = nnx.Param(uniform(rngs.params(), (patch_size, patch_size, 3, embed_dim)))
        self.bias = nnx.Param(uniform(rngs.params(), (embed_dim,)))


class PatchEmbed(Layer):
    """Images [B, H, W, 3] → tokens [B, P, D], row by row; a p×p convolution of stride p.

    Pixels right of and below the last whole patch are dropped. Since patches do not overlap the
    convolution is one matrix product, and is computed as such.
    """

    def __init__(self, patch_size: int, embed_dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.proj = _PatchProjection(patch_size, embed_dim, rngs=rngs)
        self.patch_size = patch_size
        self.dtype = jnp.dtype(dtype)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns float32 tokens."""
        p = self.patch_size
        batch, rows, columns = images.shape[0], images.shape[1] // p, images.shape[2] // p
        x = images[:, : rows * p, : columns * p].astype(self.dtype)
        x = x.reshape(batch, rows, p, columns, p, 3).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, rows * columns, p * p * 3)
        kernel = self.proj.kernel[...].reshape(p * p * 3, -1)
        x = product("bni,io->bno", x, kernel)
        return x + channels(self.proj.bias[...], x)


class Mlp(Layer):
    """fc1, exact GELU, fc2; dropout after each of the two layers."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        drop_rate: float,
        use_bias: bool = True,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        linear = {"dtype": dtype, "use_bias": use_bias, "rngs": rngs}
        self.fc1 = Linear(dim, hidden, out_dtype=dtype, **linear)
        self.fc2 = Linear(hidden, dim, out_dtype=jnp.float32, **linear)
        self.drop = Dropout(drop_rate)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Maps [B, N, D] to float32 [B, N, D]."""
        return self.drop(self.fc2(self.drop(gelu(self.fc1(x)), rngs)), rngs)


class LayerScale(Layer):
    """Multiplies a branch by a learned γ of shape [D] (CaiT, section 2.1)."""

    def __init__(self, dim: int, init: float):
        self.gamma = nnx.Param(jnp.full((dim,), init, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Scales the last axis of x."""
        return x * channels(self.gamma[...], x)


class Dropout(Mode):
    """Dropout of single values in the modes of `Mode`; computed by nnx.Dropout."""

    def __init__(self, rate: float):
        self.rate = rate

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Draws one Bernoulli variable for each value of x from the `dropout` stream."""
        if self.rate == 0.0 or not self.trains(rngs):
            return x
        return nnx.Dropout(self.rate)(x, rngs=self.noise(rngs))


class DropPath(Mode):
    """Drops a residual branch for whole samples, each with probability `rate`.

    Kept branches are divided by 1 - rate, so that the expectation is the evaluation value.
    """

    def __init__(self, rate: float):
        self.rate = rate

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Draws one Bernoulli variable for each row of x from the `dropout` stream."""
        if self.rate == 0.0 or not self.trains(rngs):
            return x
        keep = 1.0 - self.rate
        shape = (x.shape[0] * axis.count(),) + (1,) * (x.ndim - 1)
        kept = axis.own_rows(jax.random.bernoulli(self.noise(rngs), keep, shape))
        return x * (kept.astype(x.dtype) / keep)
