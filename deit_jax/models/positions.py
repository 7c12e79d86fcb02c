"""Resamples position embeddings to another grid of patches, as PyTorch's bicubic resizes images."""

import jax
import jax.numpy as jnp
import numpy as np


def resize(pos_embed: jax.Array, old: tuple[int, int], new: tuple[int, int]) -> jax.Array:
    """Resamples as timm does, inside a program: antialiased, in float32.

    Args:
      pos_embed: [1, prefix + h·w, D], patches row by row; the prefix is kept.
      old: (h, w).
      new: (H, W).

    Returns:
      float32 [1, prefix + H·W, D].
    """
    prefix = pos_embed.shape[1] - old[0] * old[1]
    field = pos_embed[0, prefix:].reshape(*old, -1)
    rows, columns = (antialiased_weights(h, w) for h, w in zip(old, new, strict=True))
    how = {"precision": jax.lax.Precision.HIGHEST, "optimize": True}
    weights = jnp.asarray(rows, jnp.float32), jnp.asarray(columns, jnp.float32)
    field = jnp.einsum("Hh,Ww,hwd->HWd", *weights, field, **how)
    field = field.reshape(1, new[0] * new[1], -1)
    return jnp.concatenate([pos_embed[:, :prefix], field], axis=1)


def clamped_weights(size: int, new_size: int) -> np.ndarray:
    """Returns [new_size, size]: PyTorch's bicubic without antialiasing, half-pixel centres."""
    centres = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5
    weights = np.zeros((new_size, size))
    for tap in (-1, 0, 1, 2):
        positions = np.floor(centres) + tap
        clamped = np.clip(positions, 0, size - 1).astype(int)
        # Several taps may fall on one border patch: add, do not assign.
        weights[np.arange(new_size), clamped] += _cubic(centres - positions, a=-0.75)
    return weights


def antialiased_weights(size: int, new_size: int) -> np.ndarray:
    """Returns [new_size, size]: PyTorch's antialiased bicubic, without taps beyond the border."""
    scale = size / new_size
    centres = (np.arange(new_size) + 0.5) * scale - 0.5
    weights = _cubic((centres[:, None] - np.arange(size)) / max(scale, 1.0), a=-0.5)
    return weights / weights.sum(axis=1, keepdims=True)


def _cubic(distance: np.ndarray, *, a: float) -> np.ndarray:
    """Evaluates Keys' cubic convolution kernel (1981)."""
    x = np.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
