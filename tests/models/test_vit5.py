"""ViT-5 beside an independent module in PyTorch, by way of the converter's mapping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from deit_jax import trees
from deit_jax.convert import layouts, mapping
from deit_jax.models import registry
from deit_jax.models.network import join_model, split_model
from tests.oracles import timm_models

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "image_size": 16, "num_classes": 7}
VARIANTS = {
    "published": {},
    "no biases": {"linear_bias": False},
    "nine registers": {"num_registers": 9},
    "heads of 72": {"embed_dim": 144, "num_heads": 2},  # XL's
}


def pair(variant, **more):
    """The oracle, our network, its variables from the oracle's, and images."""
    options = SMALL | VARIANTS[variant]
    chosen = registry.model_options("vit5_testing") | options
    oracle = timm_models.randomise(timm_models.fresh("vit5_testing", **chosen), seed=0)
    network, like = split_model(registry.abstract_model("vit5_testing", **options, **more))
    images = np.random.default_rng(1).normal(size=(3, 16, 16, 3)).astype(np.float32)
    return oracle, network, variables_of(dict(oracle.named_parameters()), like), images


def variables_of(tensors, like):
    arrays = {key: tensor.detach().numpy() for key, tensor in tensors.items()}
    return mapping.to_variables(arrays, like, layouts.REFERENCE, what="the oracle")[0]


def to_torch(images):
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def assert_close(got, want, tolerance=2e-5):
    got, want = np.asarray(got), want.detach().numpy() if torch.is_tensor(want) else want
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_every_gradient_equal_the_oracle(variant, remat):
    oracle, network, variables, images = pair(variant, remat=remat)
    weights = np.random.default_rng(2).normal(size=(3, 7)).astype(np.float32)
    logits = oracle(to_torch(images))
    (logits * torch.from_numpy(weights)).sum().backward()

    @jax.jit
    def run(variables):
        model = join_model(network, variables)
        return model(images), model.forward_features(images)

    got, features = run(variables)
    assert_close(got, logits)
    assert_close(features, oracle.forward_features(to_torch(images)))

    gradient = jax.jit(jax.grad(lambda v: (network(v, images)[0][0] * weights).sum()))(variables)
    grads = {key: tensor.grad for key, tensor in oracle.named_parameters()}
    want = trees.flat(variables_of(grads, variables))
    for name, leaf in trees.flat(gradient).items():
        assert np.abs(want[name]).max() > 1e-3, name
        assert_close(leaf, want[name], 5e-5)


def test_bfloat16_keeps_rotations_and_norms_in_float32():
    oracle, network, variables, images = pair("published", dtype="bfloat16")
    run = jax.jit(lambda v: network(v, images)[0][0])
    want = oracle(to_torch(images)).detach().numpy()
    got = run(variables)
    assert got.dtype == jnp.float32
    assert_close(got, want, 5e-2)
    text = run.lower(variables).as_text()
    assert "rsqrt" in text
    for line in text.splitlines():
        assert not ("rsqrt" in line and "bf16" in line), line
        assert not (("cosine" in line or "sine" in line) and "bf16" in line), line
