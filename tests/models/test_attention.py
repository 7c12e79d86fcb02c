"""Attention by the formulas that XLA compiles."""

import jax
import jax.numpy as jnp
import numpy as np

from deit_jax.models.attention import attend


def test_weights_that_are_recomputed_alone_are_not_stored():
    """Else XLA merges the two passes, and keeps the weights of every block."""
    qkv = jax.random.normal(jax.random.key(0), (4, 200, 384))
    memory, gradients = {}, {}
    for alone in (False, True):

        def loss(qkv, alone=alone):
            for _ in range(6):
                qkv = qkv + jnp.tile(jnp.sin(attend(2, qkv, 0, alone)), (1, 1, 3))
            return qkv.sum()

        program = jax.jit(jax.grad(loss)).lower(qkv).compile()
        memory[alone] = program.memory_analysis().temp_size_in_bytes
        gradients[alone] = program(qkv)
    assert memory[True] < 0.75 * memory[False]
    np.testing.assert_array_equal(gradients[True], gradients[False])
