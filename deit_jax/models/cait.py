"""CaiT, "Going deeper with Image Transformers" (arXiv 2103.17239): depth in two stages.

First the patches attend to one another, with talking heads; then the class token alone reads them.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from deit_jax.errors import InputError
from deit_jax.models.attention import Attention, attention_scores, merge_heads, split_heads
from deit_jax.models.layers import Dropout, Layer, Linear, product
from deit_jax.models.sizes import check_scale
from deit_jax.models.vit import Block, VisionTransformer, run_blocks

Mix = tuple[jax.Array, jax.Array]  # weights [H, H] and bias [H] of a linear layer over heads


def _mixed(num_heads: int, qkv: jax.Array, before: Mix) -> jax.Array:
    """Returns the logits that the softmax gets, float32 [B, H, N, N]."""
    q, k, _ = split_heads(qkv, num_heads, 3)
    return _mix(attention_scores(q, k), before, qkv.dtype)


def _mix(x: jax.Array, layer: Mix, dtype: DTypeLike) -> jax.Array:
    """Computes a linear layer over the heads of x [B, H, N, N], float32."""
    kernel, bias = layer
    # A product for each image, of three axes: XLA's CPU backend has no others in bfloat16.
    kernels = jnp.broadcast_to(kernel, (x.shape[0], *kernel.shape))
    flat = x.astype(dtype).reshape(*x.shape[:2], -1)
    return product("bhn,bhg->bgn", flat, kernels).reshape(x.shape) + bias[None, :, None, None]


@functools.partial(jax.checkpoint, static_argnums=0)
def attend_talking(num_heads: int, qkv: jax.Array, before: Mix, after: Mix) -> jax.Array:
    """Computes attention whose heads are mixed before and after the softmax (arXiv 2003.02436).

    The weights, [B, H, N, N], are recomputed in the backward pass, as in `attention.attend`.

    Args:
      num_heads: H.
      qkv: [B, N, 3D], its last axis [q|k|v] × [head] × [hd].
      before: mixes the heads' logits.
      after: mixes their weights, which then sum to 1 no longer.

    Returns:
      [B, N, D] in the dtype of `qkv`; the softmax is in float32.
    """
    weights = jax.nn.softmax(_mixed(num_heads, qkv, before))
    _, _, v = split_heads(qkv, num_heads, 3)
    mixed = _mix(weights, after, qkv.dtype).astype(qkv.dtype)
    return merge_heads(product("bhqk,bhkd->bhqd", mixed, v)).astype(qkv.dtype)


class TalkingHeads(Attention):
    """Self-attention with talking heads."""

    def __init__(
        self, dim: int, num_heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs, **options: object
    ):
        super().__init__(dim, num_heads, dtype=dtype, rngs=rngs, **options)
        mix = {"dtype": dtype, "out_dtype": jnp.float32, "rngs": rngs}
        self.proj_l = Linear(num_heads, num_heads, **mix)
        self.proj_w = Linear(num_heads, num_heads, **mix)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Maps [B, N, D] to float32 [B, N, D]."""
        layers = _weights(self.proj_l), _weights(self.proj_w)
        return self.drop(self.proj(attend_talking(self.num_heads, self.qkv(x), *layers)), rngs)

    def chosen(self, tokens: int) -> str:
        """Returns "xla": no kernels mix heads."""
        return "xla"

    def weights(self, x: jax.Array) -> jax.Array:
        """Returns the mixed weights of the values, float32 [B, H, N, N]."""
        qkv = self.qkv(x)
        weights = jax.nn.softmax(_mixed(self.num_heads, qkv, _weights(self.proj_l)))
        return _mix(weights, _weights(self.proj_w), qkv.dtype)

    def largest_logit(self, x: jax.Array) -> jax.Array:
        """Returns the largest logit by magnitude that the softmax gets, float32 []."""
        return jnp.abs(_mixed(self.num_heads, self.qkv(x), _weights(self.proj_l))).max()


def _weights(layer: Linear) -> Mix:
    return layer.kernel[...], layer.bias[...]


class ClassAttention(Layer):
    """Attention of the first token, the class token, to all."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        drop_rate: float,
        implementation: str,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.implementation = implementation
        self.q, self.k, self.v = (
            Linear(dim, dim, dtype=dtype, out_dtype=dtype, rngs=rngs) for _ in range(3)
        )
        self.proj = Linear(dim, dim, dtype=dtype, out_dtype=jnp.float32, rngs=rngs)
        self.drop = Dropout(drop_rate)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Maps [B, N, D] to float32 [B, 1, D]."""
        (v,) = split_heads(self.v(x), self.num_heads)
        weights = self.weights(x).astype(v.dtype)
        out = merge_heads(product("bhqk,bhkd->bhqd", weights, v)).astype(v.dtype)
        return self.drop(self.proj(out), rngs)

    def weights(self, x: jax.Array) -> jax.Array:
        """Returns the class token's weights, float32 [B, H, 1, N]."""
        return jax.nn.softmax(self._logits(x))

    def _logits(self, x: jax.Array) -> jax.Array:
        (q,) = split_heads(self.q(x[:, :1]), self.num_heads)
        (k,) = split_heads(self.k(x), self.num_heads)
        return attention_scores(q, k)

    def largest_logit(self, x: jax.Array) -> jax.Array:
        """Returns the largest attention logit by magnitude, float32 []."""
        return jnp.abs(self._logits(x)).max()


class TalkingBlock(Block):
    """A block of the first stage."""

    attention_layer = TalkingHeads


class ClassBlock(Block):
    """A block of the second stage: it changes the class token and only reads the patches."""

    attention_layer = ClassAttention

    def __call__(
        self, token: jax.Array, patches: jax.Array, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        """Maps the token [B, 1, D] to [B, 1, D]; the patches are [B, N, D]."""
        branch = self.attn(self._read(token, patches), rngs)
        token = token + self.drop_path(self.ls1(branch), rngs)
        return token + self.drop_path(self.ls2(self.mlp(self.norm2(token), rngs)), rngs)

    def attentions(
        self, token: jax.Array, patches: jax.Array
    ) -> Iterator[tuple[ClassAttention, tuple]]:
        """Yields the attention with its inputs."""
        yield self.attn, (self._read(token, patches),)

    def _read(self, token: jax.Array, patches: jax.Array) -> jax.Array:
        return self.norm1(jnp.concatenate([token, patches], axis=1))


class Cait(VisionTransformer):
    """CaiT: `depth` blocks of patches, then `depth_token_only` of the class token.

    Only the patches get position embeddings. Every block of the first stage drops its branches with
    the same rate, those of the second none; `remat` recomputes the blocks of the first. `attention`
    is "auto" or "xla", which keeps no weights for the backward pass.

    Raises InputError for dimensions that do not fit together, and without LayerScale.
    """

    block = TalkingBlock
    has_rollout = False

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        layer_scale_init: float,
        depth_token_only: int = 2,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attention: str = "auto",
        dynamic_image_size: bool = False,
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        check_scale(layer_scale_init)
        if attention not in ("auto", "xla"):
            raise InputError(
                f'attention is "{attention}", but talking heads, which mix the logits of all '
                'heads, are computed by XLA in one way; set attention to "auto"'
            )
        same = {"mlp_ratio": mlp_ratio, "layer_scale_init": layer_scale_init, "dtype": dtype}
        same |= {"attention": "xla", "rngs": rngs}
        super().__init__(
            image_size=image_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            num_classes=num_classes,
            no_embed_class=True,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            drop_path_mode="constant",
            dynamic_image_size=dynamic_image_size,
            remat=remat,
            **same,
        )
        self.drop = Dropout(drop_rate)
        self.blocks_token_only = nnx.List(
            ClassBlock(embed_dim, num_heads, drop_rate=0.0, drop_path_rate=0.0, **same)
            for _ in range(depth_token_only)
        )

    @property
    def attention_depth(self) -> int:
        """Returns how many blocks there are, of patches and of the class token."""
        return len(self.blocks) + len(self.blocks_token_only)

    def _walk(self, images: jax.Array) -> Iterator[tuple[Block, tuple, jax.Array]]:
        token, x = self._token_and_patches(images)
        for block in self.blocks:
            inputs, x = (x,), block(x)
            yield block, inputs, x
        for block in self.blocks_token_only:
            inputs, token = (token, x), block(token, x)
            yield block, inputs, token

    def _encode(self, images: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        token, x = self._token_and_patches(images)
        x = run_blocks(self.blocks, self.drop(x, rngs), rngs, self.remat)
        for block in self.blocks_token_only:
            token = block(token, x, rngs)
        return jnp.concatenate([token, x], axis=1)

    def _token_and_patches(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens = self._embed(images)
        return tokens[:, :1], tokens[:, 1:]
