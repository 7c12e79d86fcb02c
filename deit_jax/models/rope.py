"""Rotary position embeddings of image patches: RoPE-ViT (arXiv 2403.13298) and ViT-5 (2602.08071).

A rotation turns the pair of channels (2i, 2i+1) of every query and key by an angle that grows with
the patch's row and column, so that their product depends on the patches' offset alone. Positions
count patches: more pixels give more positions, as the references evaluate other image sizes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deit_jax.errors import InputError
from deit_jax.models.layers import Layer

KINDS = ("none", "axial", "mixed", "vit5")
THETA = {"axial": 100.0, "mixed": 10.0, "vit5": 10000.0}
REGISTER_THETA = 100.0  # of ViT-5's registers


class Rotation(NamedTuple):
    """Cosine and sine of the angles of all tokens, float32 [1, N, H or 1, hd / 2]."""

    cos: jax.Array
    sin: jax.Array


class Tokens(NamedTuple):
    """The sequence besides its patches: so many tokens before them, and registers after them."""

    prefix: int
    registers: int


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Turns the pairs of channels of x, float32 [B, N, H, hd]."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = rotation
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape)


def create(
    kind: str, tokens: Tokens, *, depth: int, num_heads: int, head_dim: int, rngs: nnx.Rngs
) -> "AxialRope | MixedRope | None":
    """Returns the embedding whose call gives each block its rotation; None for the kind "none".

    Raises:
      InputError: an unknown kind, or dimensions that it cannot rotate.
    """
    if kind not in KINDS:
        raise InputError(f'rope is "{kind}", expected one of {", ".join(KINDS)}')
    if kind == "none":
        return None
    if head_dim % 4:
        raise InputError(
            f'rope "{kind}" rotates pairs of channels by row and by column: a head\'s {head_dim} '
            "channels are not divisible by 4"
        )
    if kind == "mixed":
        return MixedRope(tokens, depth, num_heads, head_dim, rngs=rngs)
    return AxialRope(kind, tokens, depth, head_dim)


def frequencies(theta: float, head_dim: int) -> np.ndarray:
    """Returns radians a position, θ^(-4i / hd) for i below hd / 4, float64 [hd / 4]."""
    return theta ** (-np.arange(0, head_dim, 4) / head_dim)


class AxialRope(Layer):
    """Half of the channels turns with the column, half with the row; nothing is learned.

    "axial" (RoPE-ViT): columns first, θ = 100, registers stay as they are. "vit5": rows first,
    θ = 10000, and the registers are a square grid of their own, θ = 100.
    """

    def __init__(self, kind: str, tokens: Tokens, depth: int, head_dim: int):
        self.kind = kind
        self.tokens = tokens
        self.depth = depth
        self.head_dim = head_dim
        side = round(tokens.registers**0.5)
        if kind == "vit5" and side**2 != tokens.registers:
            raise InputError(
                f'num_registers is {tokens.registers}, but rope "vit5" lays the registers out as '
                "a square: 0, 1, 4, 9 ..."
            )
        self.register_grid = (side, side)

    def __call__(self, grid: tuple[int, int]) -> list[Rotation]:
        """Returns the rotation of each block for (rows, columns) of patches; all are the same."""
        prefix, registers = self.tokens
        angles = np.zeros((prefix + grid[0] * grid[1] + registers, self.head_dim // 2))
        end = len(angles) - registers
        angles[prefix:end] = self._angles(grid, THETA[self.kind])
        if self.kind == "vit5":
            angles[end:] = self._angles(self.register_grid, REGISTER_THETA)
        angles = angles[None, :, None]
        tables = (jnp.asarray(table, jnp.float32) for table in (np.cos(angles), np.sin(angles)))
        return [Rotation(*tables)] * self.depth

    def _angles(self, grid: tuple[int, int], theta: float) -> np.ndarray:
        columns, rows = places(grid)
        axes = (rows, columns) if self.kind == "vit5" else (columns, rows)
        turns = frequencies(theta, self.head_dim)
        return np.concatenate([np.outer(axis, turns) for axis in axes], axis=1)


class MixedRope(Layer):
    """Learned frequencies: each head of each block turns a pair by both column and row.

    `freqs` [2, L, H, hd / 2] holds radians a column, then radians a row.
    """

    def __init__(
        self, tokens: Tokens, depth: int, num_heads: int, head_dim: int, *, rngs: nnx.Rngs
    ):
        self.tokens = tokens
        # The axial frequencies with both axes turned by an angle of each head.
        angle = jax.random.uniform(rngs.params(), (1, depth, num_heads, 1), jnp.float32)
        angle = 2.0 * jnp.pi * angle
        turns = jnp.asarray(frequencies(THETA["mixed"], head_dim), jnp.float32)
        turns = turns.reshape(1, 1, 1, -1)
        first, second = ([jnp.cos(a), jnp.sin(a)] for a in (angle, angle + 0.5 * jnp.pi))
        halves = [turns * jnp.concatenate(half) for half in (first, second)]
        self.freqs = nnx.Param(jnp.concatenate(halves, axis=-1))

    def __call__(self, grid: tuple[int, int]) -> list[Rotation]:
        """Returns the rotation of each block for (rows, columns) of patches."""
        prefix, registers = self.tokens
        columns, rows = (
            jnp.asarray(place, jnp.float32).reshape(1, -1, 1, 1) for place in places(grid)
        )
        freqs = self.freqs[...]
        around = [(0, 0), (prefix, registers), (0, 0), (0, 0)]
        by_column, by_row = (part.reshape(part.shape[0], 1, *part.shape[1:]) for part in freqs)
        angles = jnp.pad(by_column * columns + by_row * rows, around)
        return [
            Rotation(jnp.cos(block), jnp.sin(block)) for block in jnp.split(angles, len(angles))
        ]


def places(grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the column and the row of each patch, row by row."""
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    return columns, rows
