"""Attention by the formulas that XLA compiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deit_jax.models.attention import attend


def _gradients(alone: bool):
    """Compiles the gradients of six attentions in a row; returns the program and its input."""

    def loss(qkv):
        for _ in range(6):
            qkv = qkv + jnp.tile(jnp.sin(attend(2, qkv, 0, alone)), (1, 1, 3))
        return qkv.sum()

    qkv = jax.random.normal(jax.random.key(0), (4, 200, 384))
    return jax.jit(jax.grad(loss)).lower(qkv).compile(), qkv


@pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="jax 0.10 drops barriers on CPUs; 0.11 was not tried"
)
def test_weights_that_are_recomputed_alone_are_not_stored():
    """Else XLA merges the two passes, and keeps the weights of every block."""
    memory = [_gradients(alone)[0].memory_analysis().temp_size_in_bytes for alone in (False, True)]
    assert memory[1] < 0.75 * memory[0]


def test_weights_that_are_recomputed_alone_change_no_gradient():
    (kept, qkv), (alone, _) = _gradients(alone=False), _gradients(alone=True)
    np.testing.assert_array_equal(alone(qkv), kept(qkv))
