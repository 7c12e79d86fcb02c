"""Attention in cuDNN, as far as it can be seen without a GPU: what JAX asks of it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from deit_jax.errors import InputError
from tests.models.test_attention_tpu import error
from tests.training import steps


def model(**options):
    return steps.new_model("deit_testing", depth=1, dtype="bfloat16", **options)


def loss(network, images, variables):
    return jnp.square(network(variables, images, jax.random.key(0))[0][0] - 1).mean()


@pytest.mark.parametrize(("image_size", "rows"), [(32, 66), (36, 82)])
def test_an_even_number_of_rows_goes_to_cudnn(monkeypatch, image_size, rows):
    """65 or 82 tokens, differentiated; JAX refuses odd numbers."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    network, variables = model(attention="cudnn", image_size=image_size)
    gradient = jax.grad(functools.partial(loss, network, jnp.zeros((2, image_size, image_size, 3))))
    lowered = jax.jit(gradient).trace(variables).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"__cudnn\$fmha(\w+)\(.*?tensor<2x(\d+)x", lowered)
    assert calls == [("Softmax", str(rows)), ("SoftmaxBackward", str(rows))]


def test_rows_that_are_no_tokens_change_nothing(monkeypatch):
    """By JAX's formulas of what is asked of cuDNN, beside those of the package."""
    ask = jax.nn.dot_product_attention

    def by_xla(*operands, implementation, **options):
        assert implementation == "cudnn"
        return ask(*operands, **options, implementation="xla")

    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    found = {}
    for how in ("cudnn", "xla"):
        network, variables = model(attention=how)
        variables = jax.tree.map(lambda x: 2.5 * x if x.ndim == 2 else x, variables)
        with monkeypatch.context() as patched, jax.numpy_dtype_promotion("standard"):
            patched.setattr(jax.nn, "dot_product_attention", by_xla)
            value, grads = jax.value_and_grad(functools.partial(loss, network, images))(variables)
        found[how] = np.concatenate([np.ravel(x) for x in [value, *jax.tree.leaves(grads)]])
    assert error(found["cudnn"], found["xla"]) < 0.01


def test_where_there_is_no_cudnn_one_line_says_so(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", None)
    network, variables = model(attention="cudnn")
    with pytest.raises(InputError, match=r"cuDNN is not detected.*set attention to \"auto\""):
        loss(network, jnp.zeros((2, 32, 32, 3)), variables)


def test_float32_is_refused():
    with pytest.raises(InputError, match='attention is "cudnn", whose kernels compute in bfloat16'):
        steps.new_model("deit_testing", attention="cudnn")
