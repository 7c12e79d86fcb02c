"""The hMLP stem of "Three things everyone should know about Vision Transformers" (2203.09795)."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from deit_jax.errors import InputError
from deit_jax.models.layers import Layer, channels, gelu, product
from deit_jax.models.norms import BatchNorm

PATCH = 4 * 2 * 2


class PatchConv(Layer):
    """A convolution whose stride is its size: each patch of [B, H, W, C] by itself."""

    def __init__(
        self, size: int, in_features: int, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        bound = (in_features * size**2) ** -0.5  # as PyTorch initialises a convolution
        uniform = functools.partial(
            jax.random.uniform, dtype=jnp.float32, minval=-bound, maxval=bound
        )
        self.kernel = nnx.Param(uniform(rngs.params(), (size, size, in_features, features)))
        self.bias = nnx.Param(uniform(rngs.params(), (features,)))
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Returns float32 [B, H / size, W / size, features]; drops what fills no patch."""
        kernel = self.kernel[...]
        p, _, width, features = kernel.shape
        batch, rows, columns = x.shape[0], x.shape[1] // p, x.shape[2] // p
        x = x[:, : rows * p, : columns * p].astype(self.dtype)
        x = x.reshape(batch, rows, p, columns, p, width).transpose(0, 1, 3, 2, 4, 5)
        x = product(
            "bni,io->bno", x.reshape(batch, rows * columns, -1), kernel.reshape(-1, features)
        )
        return (x + channels(self.bias[...], x)).reshape(batch, rows, columns, features)


class Gelu(Layer):
    """Exact GELU between the layers of a list."""

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Returns x's shape and type."""
        return gelu(x)


class HmlpStem(Layer):
    """Images [B, H, W, 3] → tokens [B, P, D] of 16×16 pixels, row by row.

    Convolutions of 4, 2 and 2 pixels, each with its stride, batch norm after each and GELU between:
    no two patches meet, but for the batch's statistics.

    Raises InputError for another patch size, or a width that is not divisible by 4.
    """

    def __init__(self, patch_size: int, embed_dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        if patch_size != PATCH or embed_dim % 4:
            raise InputError(
                f"hmlp is True, whose stem makes patches of {PATCH} pixels, of a width divisible "
                f"by 4, but patch_size is {patch_size} and embed_dim {embed_dim}"
            )
        conv = functools.partial(PatchConv, dtype=dtype, rngs=rngs)
        hidden = embed_dim // 4
        self.proj = nnx.List(
            [
                *(conv(4, 3, hidden), BatchNorm(hidden), Gelu()),
                *(conv(2, hidden, hidden), BatchNorm(hidden), Gelu()),
                *(conv(2, hidden, embed_dim), BatchNorm(embed_dim)),
            ]
        )

    def __call__(self, images: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Returns float32 tokens; training, with `rngs`, normalises by the batch's statistics."""
        x = images
        for layer in self.proj:
            x = layer(x, rngs)
        return x.reshape(x.shape[0], -1, x.shape[-1])
