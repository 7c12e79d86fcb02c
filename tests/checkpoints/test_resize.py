"""Position embeddings resampled to other grids, against the resizes of PyTorch and timm."""

import numpy as np
import pytest
import torch

from deit_jax.checkpoints.fit import resize_pos_embed
from deit_jax.errors import InputError
from tests.oracles.reference_vit import interpolate

from timm.layers import resample_abs_pos_embed  # isort: skip  # after torchvision's preparation

GRIDS = [
    ((14, 14), (24, 24)),
    ((24, 24), (14, 14)),
    ((14, 14), (12, 12)),
    ((16, 16), (11, 11)),
    ((14, 10), (12, 20)),
    ((12, 20), (14, 10)),
    ((7, 9), (9, 7)),
    # Not one column: there torch's antialiased resize contradicts its own channels-last result.
    ((3, 8), (8, 2)),
]


def embeddings(rows, *, width=16, seed=0):
    """[1, rows, width] of the size of trained ones: channels of std 0.02 to 0.14."""
    rng = np.random.default_rng(seed)
    stds = np.geomspace(0.02, 0.14, width)
    return (rng.normal(size=(1, rows, width)) * stds).astype(np.float32)


@pytest.mark.parametrize("kernel", ["reference", "timm"])
@pytest.mark.parametrize(("old_grid", "grid"), GRIDS)
def test_resize_equals_torch(kernel, old_grid, grid):
    pos = embeddings(2 + old_grid[0] * old_grid[1])
    got = resize_pos_embed(pos, grid=grid, num_prefix=2, old_grid=old_grid, kernel=kernel)
    assert got.dtype == np.float32
    assert got.shape == (1, 2 + grid[0] * grid[1], 16)
    np.testing.assert_array_equal(got[:, :2], pos[:, :2])
    field = torch.from_numpy(pos[0, 2:].reshape(*old_grid, 16))
    # torch rounds positions and weights to float32, and so adds noise of its own.
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 1e-6)):
        want = interpolate(field.to(dtype), grid, antialias=kernel == "timm").numpy()
        np.testing.assert_allclose(got[0, 2:].reshape(want.shape), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("num_prefix", [0, 1, 2])
@pytest.mark.parametrize(("old_grid", "grid"), [GRIDS[0], GRIDS[1], GRIDS[4]])
def test_timm_kernel_equals_timm(num_prefix, old_grid, grid):
    pos = embeddings(num_prefix + old_grid[0] * old_grid[1])
    given = None if old_grid[0] == old_grid[1] else old_grid  # None: square
    got = resize_pos_embed(pos, grid=grid, num_prefix=num_prefix, old_grid=given, kernel="timm")
    want = resample_abs_pos_embed(
        torch.from_numpy(pos), grid, old_grid, num_prefix_tokens=num_prefix
    )
    np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (1 + 15, {"num_prefix": 1}, "15 position .*old_grid"),
        (1 + 16, {"num_prefix": 1, "old_grid": (3, 5)}, "from 3×5 to 6×6"),
        (1 + 16, {"num_prefix": 1, "grid": (0, 6)}, "to 0×6"),
        (1 + 16, {"num_prefix": 1, "kernel": "nearest"}, "nearest"),
        (2, {"num_prefix": 2}, r"shape \(1, 2, 16\), expected"),
    ],
)
def test_resize_explains_bad_input(rows, options, message):
    with pytest.raises(InputError, match=message):
        resize_pos_embed(embeddings(rows), **({"grid": (6, 6)} | options))
