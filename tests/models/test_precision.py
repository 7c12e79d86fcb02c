"""float32 is multiplied as float32 on every accelerator; the lowered program says so."""

import re

import jax
import jax.numpy as jnp
import pytest

from configs import digits
from deit_jax.models import registry
from deit_jax.models.network import split_model
from deit_jax.training.run import matmuls


def _matmuls(name, dtype):
    """The lines of a training pass and its gradient that multiply, as lowered for TPUs."""
    network, like = split_model(registry.abstract_model(name, num_classes=3, dtype=dtype))
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def loss(variables, images, key):
        heads, _ = network(variables, images, key)
        return sum(head.sum() for head in heads)

    traced = jax.jit(jax.grad(loss)).trace(like, images, key)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    return re.findall(r".*stablehlo\.(?:dot_general|convolution).*", text)


@pytest.mark.parametrize("name", ["deit_testing_distilled", "deit3_testing", "regnety_testing"])
def test_float32_asks_for_full_precision(name):
    config = digits.get_config()
    config.train.dtype = "float32"
    with matmuls(config):
        lines = _matmuls(name, "float32")
    assert len(lines) > 10
    assert all(line.count("HIGHEST") == 2 for line in lines), lines
    assert not any("HIGH" in line for line in _matmuls(name, "bfloat16"))
    config.train.dtype = "float32_fast"
    with matmuls(config):
        assert not any("HIGH" in line for line in _matmuls(name, "float32"))
