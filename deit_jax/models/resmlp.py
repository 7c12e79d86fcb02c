"""ResMLP (arXiv 2105.03404): blocks of linear layers, over the patches and over the channels."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from deit_jax.models.features import Backbone, classifier
from deit_jax.models.layers import (
    DropPath,
    Layer,
    LayerScale,
    Linear,
    Mlp,
    PatchEmbed,
    channels,
)
from deit_jax.models.sizes import check_images, check_mlp, check_scale, size_of
from deit_jax.models.vit import run_blocks


class Affine(Layer):
    """Scales and shifts each channel, in float32; it stands where others normalise."""

    def __init__(self, features: int):
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns float32."""
        return x * channels(self.scale[...], x) + channels(self.bias[...], x)


class TokenLinear(Linear):
    """A linear layer over the tokens [B, N, D], the same for each channel."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, N, D] to [B, N, D]."""
        return super().__call__(x.transpose(0, 2, 1)).transpose(0, 2, 1)


class ResMlpBlock(Layer):
    """x += droppath(γ1 · tokens(norm1(x))), then x += droppath(γ2 · mlp(norm2(x)))."""

    def __init__(
        self,
        dim: int,
        num_patches: int,
        *,
        mlp_ratio: float,
        layer_scale_init: float,
        drop_rate: float,
        drop_path_rate: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        same = {"dtype": dtype, "rngs": rngs}
        self.norm1 = Affine(dim)
        self.linear_tokens = TokenLinear(num_patches, num_patches, out_dtype=jnp.float32, **same)
        self.norm2 = Affine(dim)
        self.mlp_channels = Mlp(dim, int(dim * mlp_ratio), drop_rate=drop_rate, **same)
        self.drop_path = DropPath(drop_path_rate)
        self.ls1 = LayerScale(dim, layer_scale_init)
        self.ls2 = LayerScale(dim, layer_scale_init)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Maps [B, N, D] to [B, N, D], the residual stream in float32."""
        x = x + self.drop_path(self.ls1(self.linear_tokens(self.norm1(x))), rngs)
        return x + self.drop_path(self.ls2(self.mlp_channels(self.norm2(x), rngs)), rngs)


class ResMlp(Backbone):
    """ResMLP: patches alone, without positions; the head reads their mean.

    The weights over the patches fix the image size. All blocks drop their branches with the same
    rate. `remat` recomputes each block in the backward pass.

    Raises InputError for an image smaller than a patch, an MLP without a hidden unit, and without
    LayerScale.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int,
        depth: int,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        layer_scale_init: float,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        check_mlp(embed_dim, mlp_ratio)
        check_scale(layer_scale_init)
        self.image_size = size_of(image_size, patch_size)
        self.remat = remat
        num_patches = (self.image_size[0] // patch_size) * (self.image_size[1] // patch_size)
        self.stem = PatchEmbed(patch_size, embed_dim, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            ResMlpBlock(
                embed_dim,
                num_patches,
                mlp_ratio=mlp_ratio,
                layer_scale_init=layer_scale_init,
                drop_rate=drop_rate,
                drop_path_rate=drop_path_rate,
                dtype=dtype,
                rngs=rngs,
            )
            for _ in range(depth)
        )
        self.norm = Affine(embed_dim)
        self.num_features = embed_dim
        self.dtype = jnp.dtype(dtype)
        self._create_heads(num_classes, rngs)

    def __call__(self, images: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Maps images [B, H, W, 3] to float32 logits [B, K]; modes as in VisionTransformer."""
        return self.head(*self._pooled(images, rngs))

    def heads(self, images: jax.Array, rngs: nnx.Rngs | None = None) -> tuple[jax.Array, ...]:
        """Returns (logits,), float32 [B, K]."""
        return (self(images, rngs),)

    def forward_features(self, images: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Returns all patches after the last affine layer, float32 [B, N, D]."""
        self._grid(images)
        return self.norm(run_blocks(self.blocks, self.stem(images), rngs, self.remat))

    def _create_heads(self, num_classes: int, rngs: nnx.Rngs) -> None:
        self.head = classifier(self.num_features, num_classes, dtype=self.dtype, rngs=rngs)

    def _pooled(self, images: jax.Array, rngs: nnx.Rngs | None = None) -> tuple[jax.Array, ...]:
        return (self.forward_features(images, rngs).mean(1),)

    def _grid(self, images: jax.Array) -> tuple[int, int]:
        check_images(images, self.image_size)
        return self.image_size[0] // self.stem.patch_size, self.image_size[
            1
        ] // self.stem.patch_size

    def _walk(self, images: jax.Array) -> Iterator[tuple[ResMlpBlock, tuple, jax.Array]]:
        x = self.stem(images)
        for block in self.blocks:
            inputs, x = (x,), block(x)
            yield block, inputs, x
