"""Layouts that are asked of the compiler on some platforms change no value and no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deit_jax.models.layouts import row_major


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
