"""Layouts that are asked of the compiler on some platforms change no value and no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deit_jax.models import layouts
from deit_jax.models.layouts import row_major


@pytest.mark.parametrize(
    ("platform", "dtype", "tokens", "axes"),
    [
        ("cpu", "float32", 197, 2),
        ("cpu", "bfloat16", 200, 3),
        ("gpu", "bfloat16", 197, 2),
        ("tpu", "bfloat16", 200, 2),
        ("tpu", "bfloat16", 197, 3),
        (None, "bfloat16", 197, 2),
    ],
)
def test_blocks_work_on_two_axes_where_that_is_faster(monkeypatch, platform, dtype, tokens, axes):
    monkeypatch.setattr(layouts.devices, "platform", lambda: platform)
    rows = layouts.in_rows(jnp.zeros((2, tokens, 4)), jnp.dtype(dtype))
    assert rows.shape == ((2 * tokens, 4) if axes == 2 else (2, tokens, 4))


def _loss(x, pinned):
    x = jnp.sin(x)
    return jnp.square(row_major(x, "cuda", "tpu") if pinned else x).sum()


@pytest.mark.parametrize("around", [lambda f: f, jax.jit, jax.checkpoint, jax.vmap])
def test_row_major_changes_nothing(around):
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 4))
    found, expected = (
        around(jax.value_and_grad(lambda x, pin=pin: _loss(x, pin)))(x) for pin in (True, False)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(("platform", "times"), [("cpu", 0), ("cuda", 2), ("tpu", 2)])
def test_row_major_asks_for_value_and_cotangent(platform, times):
    """Where the program is compiled for a platform that it names, and nowhere else."""
    traced = jax.jit(jax.grad(lambda x: _loss(x, True))).trace(jnp.ones((2, 3, 4)))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("@LayoutConstraint") == times
    assert text.count("result_layouts = [dense<[2, 1, 0]>") == times


ON_A_MESH = """
import jax, jax.numpy as jnp
from deit_jax.models.layouts import row_major
from deit_jax.parallel import devices
from deit_jax.parallel.mesh import batch_sharding, make_mesh

mesh = make_mesh(fsdp=2)
loss = jax.jit(jax.grad(lambda x: jnp.sin(row_major(jnp.sin(x), "cpu")).sum()))
shape = jax.ShapeDtypeStruct((8, 3, 4), jnp.float32, sharding=batch_sharding(mesh))
with devices.of(mesh):
    lowered = loss.lower(shape)
assert "@LayoutConstraint" in lowered.as_text()
assert "all-gather" not in lowered.compile().as_text()
assert row_major(mesh, "cpu") is mesh  # outside, where several devices are not known
"""


@pytest.mark.slow
def test_row_major_gathers_nothing(run_python):
    """XLA of jax 0.10 does not divide the constraint among the devices of a mesh."""
    done = run_python("-c", ON_A_MESH, env={"JAX_NUM_CPU_DEVICES": "4"})
    assert done.returncode == 0, done.stderr
