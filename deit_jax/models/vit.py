"""The transformers of DeiT (arXiv 2012.12877) and DeiT III (2204.07118), RoPE-ViT and ViT-5."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from deit_jax.errors import InputError
from deit_jax.models import positions
from deit_jax.models import rope as rotary
from deit_jax.models.attention import Attention, check_kernels
from deit_jax.models.features import Backbone, classifier
from deit_jax.models.hmlp import HmlpStem
from deit_jax.models.layers import (
    Dropout,
    DropPath,
    Layer,
    LayerScale,
    Mlp,
    PatchEmbed,
    normal_param,
)
from deit_jax.models.layouts import in_rows, row_major
from deit_jax.models.norms import NORMS
from deit_jax.models.sizes import check_images, check_mlp, size_of


class Block(Layer):
    """Applies a pre-norm transformer block to a float32 residual stream [B, N, D].

    x += droppath(γ1 · attention(norm1(x))), then x += droppath(γ2 · mlp(norm2(x))); without
    LayerScale there is no γ. The two branches are dropped independently.
    """

    attention_layer = Attention

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        layer_scale_init: float | None,
        drop_rate: float,
        drop_path_rate: float,
        attention: str,
        norm: str = "layer",
        linear_bias: bool = True,
        attention_switches: dict[str, object] | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        common = {"drop_rate": drop_rate, "dtype": dtype, "rngs": rngs}
        self.norm1 = NORMS[norm](dim, dtype=dtype)
        self.attn = self.attention_layer(
            dim, num_heads, implementation=attention, **(attention_switches or {}), **common
        )
        self.norm2 = NORMS[norm](dim, dtype=dtype)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), use_bias=linear_bias, **common)
        self.drop_path = DropPath(drop_path_rate)
        self.layer_scale = layer_scale_init is not None
        if self.layer_scale:
            self.ls1 = LayerScale(dim, layer_scale_init)
            self.ls2 = LayerScale(dim, layer_scale_init)

    def __call__(
        self,
        x: jax.Array,
        rngs: nnx.Rngs | None = None,
        *rotation: rotary.Rotation,
        **absent: int,
    ) -> jax.Array:
        """Maps [B, N, D] to [B, N, D], with at most one rotation, and `absent` as Attention has."""
        images = x.shape
        # Attention in VMEM wants rows as they are; without it XLA may put the batch last.
        pinned = () if self.attn.chosen(images[1]) == "pallas" else ("tpu",)
        x = in_rows(row_major(x, *pinned), self.norm1.dtype)
        branch = self.attn(self.norm1(x).reshape(images), rngs, *rotation, **absent)
        branch = branch.reshape(x.shape)
        x = x + self._drop(self.ls1(branch) if self.layer_scale else branch, images, rngs)
        branch = self.mlp(self.norm2(x), rngs)
        x = x + self._drop(self.ls2(branch) if self.layer_scale else branch, images, rngs)
        return row_major(x.reshape(images), *pinned, "cuda")

    def _drop(self, branch: jax.Array, images: tuple[int, ...], rngs: nnx.Rngs | None) -> jax.Array:
        return self.drop_path(branch.reshape(images), rngs).reshape(branch.shape)

    def attentions(
        self, x: jax.Array, *rotation: rotary.Rotation
    ) -> Iterator[tuple[Attention, tuple]]:
        """Yields the attention with its inputs."""
        yield self.attn, (self.norm1(x), *rotation)


class VisionTransformer(Backbone):
    """DeiT, distilled DeiT, DeiT III, and what the switches make of them: RoPE-ViT, ViT-5.

    Tokens are [class, patches], or [class, distillation, patches] if `distilled`, then
    `num_registers` registers. With `no_embed_class` (DeiT III) the patches alone get learned
    position embeddings; otherwise the tokens before them do too; without `pos_embed` nothing does.
    `rope` rotates queries and keys by the patches' places: "none", "axial" or "mixed" (RoPE-ViT),
    or "vit5" (see `rope`). `norm` is "layer" or "rms"; `qk_norm` applies it to each query and key.
    `qkv_bias` and `linear_bias` are the biases of qkv and of the other linear layers of the blocks.
    `drop_path_mode` is "linear" (block i of L drops with rate·i/(L-1), as DeiT) or "constant"
    (every block drops with the same rate, as DeiT III). `hmlp` embeds the patches by an HmlpStem in
    place of one projection. `remat` recomputes each block in the backward pass instead of storing
    its intermediates. `attention` is "xla", "xla_remat" (only its weights are recomputed), "pallas"
    (kernels for TPUs, in bfloat16; elsewhere interpreted, slowly), "cudnn" (kernels for GPUs, in
    bfloat16), or "auto": those for TPUs where they are faster. `dynamic_image_size` takes images of
    any size that is whole patches, and resamples the position embeddings for each; it may be set at
    any time.

    Raises InputError for dimensions that do not fit together.
    """

    block = Block
    has_attention = has_rollout = True

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
        distilled: bool = False,
        no_embed_class: bool = False,
        layer_scale_init: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_path_mode: str = "linear",
        rope: str = "none",
        pos_embed: bool = True,
        num_registers: int = 0,
        norm: str = "layer",
        qk_norm: bool = False,
        qkv_bias: bool = True,
        linear_bias: bool = True,
        hmlp: bool = False,
        attention: str = "auto",
        dynamic_image_size: bool = False,
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        image_size = size_of(image_size, patch_size)
        check_mlp(embed_dim, mlp_ratio)
        if embed_dim % num_heads:
            raise InputError(f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}")

        grid = image_size[0] // patch_size, image_size[1] // patch_size
        num_patches = grid[0] * grid[1]
        num_prefix = 2 if distilled else 1
        self.num_tokens = num_prefix + num_patches + num_registers
        check_kernels(attention, self.num_tokens, num_heads, embed_dim // num_heads, dtype)

        self.image_size = image_size
        self.dynamic_image_size = dynamic_image_size
        self.patch_size = patch_size
        self.grid = grid
        self.num_features = embed_dim
        self.dtype = jnp.dtype(dtype)
        self.distilled = distilled
        self.no_embed_class = no_embed_class
        self.hmlp = hmlp
        self.remat = remat
        num_positions = num_patches if no_embed_class else num_prefix + num_patches
        self.num_prefix = num_prefix
        self.num_registers = num_registers

        stem = HmlpStem if hmlp else PatchEmbed
        self.patch_embed = stem(patch_size, embed_dim, dtype=dtype, rngs=rngs)
        self.cls_token = normal_param(rngs, (1, 1, embed_dim), 0.02)
        if distilled:
            self.dist_token = normal_param(rngs, (1, 1, embed_dim), 0.02)
        if num_registers:
            self.reg_token = normal_param(rngs, (1, num_registers, embed_dim), 0.02)
        shape = 1, num_positions, embed_dim
        self.pos_embed = normal_param(rngs, shape, 0.02) if pos_embed else None
        switches = {"qkv_bias": qkv_bias, "proj_bias": linear_bias}
        switches["qk_norm"] = norm if qk_norm else None
        self.rope = rotary.create(
            rope,
            rotary.Tokens(num_prefix, num_registers),
            depth=depth,
            num_heads=num_heads,
            head_dim=embed_dim // num_heads,
            rngs=rngs,
        )
        # DeiT III's reference has dropout in the blocks only.
        self.drop = Dropout(0.0 if no_embed_class else drop_rate)
        self.blocks = nnx.List(
            self.block(
                embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                layer_scale_init=layer_scale_init,
                drop_rate=drop_rate,
                drop_path_rate=rate,
                attention=attention,
                norm=norm,
                linear_bias=linear_bias,
                attention_switches=switches,
                dtype=dtype,
                rngs=rngs,
            )
            for rate in _drop_path_rates(drop_path_rate, depth, drop_path_mode)
        )
        self.norm = NORMS[norm](embed_dim, dtype=jnp.float32)
        self._create_heads(num_classes, rngs)

    def __call__(self, images: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Maps images [B, H, W, 3] to float32 logits [B, K]; distilled: the mean of both heads.

        Training noise, dropout and stochastic depth, is drawn from `rngs`: with them a call is
        training, without them evaluation. After `model.train()` a call without `rngs` raises
        InputError where there is noise to draw; after `model.eval()` `rngs` are ignored.
        """
        logits = self.heads(images, rngs)
        return sum(logits) / len(logits)

    def heads(self, images: jax.Array, rngs: nnx.Rngs | None = None) -> tuple[jax.Array, ...]:
        """Returns (class logits,) or (class logits, distillation logits), each float32 [B, K]."""
        heads = (self.head, self.head_dist) if self.distilled else (self.head,)
        pooled = self._pooled(images, rngs)
        return tuple(head(x) for head, x in zip(heads, pooled, strict=True))

    def forward_features(self, images: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Returns all tokens after the last LayerNorm, float32 [B, N, D]."""
        return self.norm(self._encode(images, rngs))

    def _pooled(self, images: jax.Array, rngs: nnx.Rngs | None = None) -> tuple[jax.Array, ...]:
        tokens = self._encode(images, rngs)
        if not self.distilled:
            return (self.norm(tokens[:, 0]),)
        prefix = self.norm(tokens[:, :2])
        return prefix[:, 0], prefix[:, 1]

    def _create_heads(self, num_classes: int, rngs: nnx.Rngs) -> None:
        for name in ("head", "head_dist") if self.distilled else ("head",):
            head = classifier(self.num_features, num_classes, dtype=self.dtype, rngs=rngs)
            setattr(self, name, head)

    def _walk(self, images: jax.Array) -> Iterator[tuple[Block, tuple, jax.Array]]:
        x = self._embed(images)
        rotations = self._rotations(images)
        for number, block in enumerate(self.blocks):
            rotation = rotations[number : number + 1]
            inputs, x = (x, *rotation), block(x, None, *rotation)
            yield block, inputs, x

    def _encode(self, images: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        x = self._embed(images, rngs)
        x = self.drop(x, rngs)
        tokens = x.shape[1]
        absent = self.blocks[0].attn.absent_rows(tokens)
        rotations = [
            rotary.Rotation(*(_with_rows(table, absent) for table in rotation))
            for rotation in self._rotations(images)
        ]
        x = _with_rows(x, absent)
        x = run_blocks(self.blocks, x, rngs, self.remat, rotations, absent=absent)
        return x[:, :tokens]

    def _rotations(self, images: jax.Array) -> list[rotary.Rotation]:
        return [] if self.rope is None else self.rope(self._grid(images))

    def _grid(self, images: jax.Array) -> tuple[int, int]:
        """Returns (rows, columns) of patches; raises InputError for images that do not fit."""
        size = tuple(images.shape[1:3])
        if not self.dynamic_image_size or size == self.image_size or images.ndim != 4:
            check_images(images, self.image_size)
            return self.grid
        if any(side < self.patch_size or side % self.patch_size for side in size):
            raise InputError(
                f"images are {size[0]}×{size[1]}, expected sides that are multiples of the "
                f"{self.patch_size} pixels of a patch: resize or pad them"
            )
        check_images(images, size)
        rows, columns = (side // self.patch_size for side in size)
        attention, tokens = self.blocks[0].attn, self.num_prefix + rows * columns
        heads = tokens + self.num_registers, attention.num_heads, attention.head_dim
        check_kernels(attention.implementation, *heads, self.dtype)
        return rows, columns

    def _positions(self, images: jax.Array) -> jax.Array:
        learned, grid = self.pos_embed[...], self._grid(images)
        return learned if grid == self.grid else positions.resize(learned, self.grid, grid)

    def _embed(self, images: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        self._grid(images)
        x = self.patch_embed(images, rngs) if self.hmlp else self.patch_embed(images)
        tokens = [self.cls_token, self.dist_token] if self.distilled else [self.cls_token]
        prefix = [jnp.broadcast_to(token[...], (x.shape[0], 1, x.shape[2])) for token in tokens]
        learned = self.pos_embed is not None
        if learned and self.no_embed_class:
            x = x + self._positions(images)
        x = jnp.concatenate([*prefix, x], axis=1)
        if learned and not self.no_embed_class:
            x = x + self._positions(images)
        if self.num_registers:
            shape = x.shape[0], self.num_registers, x.shape[2]
            x = jnp.concatenate([x, jnp.broadcast_to(self.reg_token[...], shape)], axis=1)
        return x


def _with_rows(x: jax.Array, count: int) -> jax.Array:
    """Appends so many rows of zeros to the second axis."""
    return jnp.pad(x, [(0, 0), (0, count)] + [(0, 0)] * (x.ndim - 2)) if count else x


def run_blocks(
    blocks: nnx.List,
    x: jax.Array,
    rngs: nnx.Rngs | None,
    remat: bool,
    rotations: Sequence[rotary.Rotation] = (),
    **absent: int,
) -> jax.Array:
    """Passes x through the blocks, each with its rotation, if any.

    Each block is recomputed in the backward pass if `remat`.
    """
    for number, block in enumerate(blocks):
        inputs = x, rngs, *rotations[number : number + 1]
        if remat:
            x = nnx.remat(lambda block, *inputs: block(*inputs, **absent))(block, *inputs)
        else:
            x = block(*inputs, **absent)
    return x


def _drop_path_rates(rate: float, depth: int, mode: str) -> list[float]:
    """Returns every block's stochastic-depth rate."""
    if not 0.0 <= rate < 1.0:
        raise InputError(f"drop_path_rate is {rate}, expected a number from 0 to below 1")
    if mode == "constant":
        return [rate] * depth
    if mode == "linear":
        return [rate * i / max(depth - 1, 1) for i in range(depth)]
    raise InputError(f'drop_path_mode is "{mode}", expected "linear" or "constant"')
