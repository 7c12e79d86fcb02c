"""Vision transformers of parallel blocks ("Three things everyone should know ...", 2203.09795)."""

from collections.abc import Iterator

import jax
from flax import nnx
from jax.typing import DTypeLike

from deit_jax.models.attention import Attention
from deit_jax.models.layers import DropPath, Layer, LayerScale, Mlp
from deit_jax.models.layouts import row_major
from deit_jax.models.norms import NORMS
from deit_jax.models.rope import Rotation
from deit_jax.models.vit import VisionTransformer


class Branch(Layer):
    """Computes droppath(γ · layer(norm(x))); without LayerScale there is no γ."""

    def __init__(
        self,
        dim: int,
        *,
        layer_scale_init: float | None,
        drop_path_rate: float,
        norm: str,
        dtype: DTypeLike,
        **layer: Layer,
    ):
        self.norm = NORMS[norm](dim, dtype=dtype)
        ((self.kind, module),) = layer.items()  # timm's name of it: attn or mlp
        setattr(self, self.kind, module)
        self.layer_scale = layer_scale_init is not None
        if self.layer_scale:
            self.ls = LayerScale(dim, layer_scale_init)
        self.drop_path = DropPath(drop_path_rate)

    def __call__(
        self, x: jax.Array, rngs: nnx.Rngs | None = None, *rotation: Rotation, **absent: int
    ) -> jax.Array:
        """Maps [B, N, D] to float32 [B, N, D], an attention with what it takes besides."""
        out = getattr(self, self.kind)(self.norm(x), rngs, *rotation, **absent)
        return self.drop_path(self.ls(out) if self.layer_scale else out, rngs)


class ParallelBlock(Layer):
    """Adds two attention branches to the residual stream [B, N, D] at once, then two MLPs.

    All four are dropped independently.
    """

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
        same = {"drop_rate": drop_rate, "dtype": dtype, "rngs": rngs}
        attend = {"implementation": attention, **(attention_switches or {}), **same}
        mlp = {"use_bias": linear_bias, **same}
        branch = {"layer_scale_init": layer_scale_init, "drop_path_rate": drop_path_rate}
        branch |= {"norm": norm, "dtype": dtype}
        self.attns = nnx.List(
            Branch(dim, attn=Attention(dim, num_heads, **attend), **branch) for _ in range(2)
        )
        self.ffns = nnx.List(
            Branch(dim, mlp=Mlp(dim, int(dim * mlp_ratio), **mlp), **branch) for _ in range(2)
        )

    @property
    def attn(self) -> Attention:
        """Returns the first attention, for what both have in common."""
        return self.attns[0].attn

    def __call__(
        self, x: jax.Array, rngs: nnx.Rngs | None = None, *rotation: Rotation, **absent: int
    ) -> jax.Array:
        """Maps [B, N, D] to [B, N, D], as Block does."""
        x = row_major(x, "tpu")
        x = x + sum(branch(x, rngs, *rotation, **absent) for branch in self.attns)
        x = x + sum(branch(x, rngs) for branch in self.ffns)
        return row_major(x, "tpu", "cuda")

    def attentions(self, x: jax.Array, *rotation: Rotation) -> Iterator[tuple[Attention, tuple]]:
        """Yields each attention with its inputs."""
        for branch in self.attns:
            yield branch.attn, (branch.norm(x), *rotation)


class ParallelVisionTransformer(VisionTransformer):
    """A VisionTransformer of parallel blocks: half as deep, as many branches."""

    block = ParallelBlock
