import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from deit_jax import trees
from deit_jax.errors import InputError
from deit_jax.models import registry
from deit_jax.models.network import split_model
from deit_jax.models.norms import BatchNorm
from deit_jax.models.regnet import RegNetY, conv3x3
from deit_jax.models.regnet_folded import fold
from tests.models.test_vit import assert_close, to_torch
from tests.oracles import timm_models

# One block or two a stage, groups 1, 1, 2, 4.
SMALL = {"w0": 16, "wa": 20.0, "wm": 2.0, "group_width": 32, "depth": 5, "stem_width": 16}
# Ten blocks in the third stage: their names do not sort in the order of computation.
DEEP = {"w0": 8, "wa": 18.0, "wm": 3.8, "group_width": 56, "depth": 14, "stem_width": 8}


def pair(options, **more):
    """Return timm's model and ours with the same weights, and images for both."""
    oracle = timm_models.regnety(**options, num_classes=7)
    build = functools.partial(RegNetY, **options, num_classes=7, **more)
    ours = timm_models.with_weights_of(oracle, build)
    # Odd and even sizes: padding and strides must agree at both.
    images = np.random.default_rng(1).normal(size=(8, 67, 64, 3)).astype(np.float32)
    return oracle, ours, images


def run(model, images):
    """Return (logits, features, running statistics) of one compiled evaluation pass."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def outputs(state):
        model = nnx.merge(graphdef, state)
        logits, features = model(images), model.forward_features(images)
        return logits, features, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    return outputs(nnx.to_pure_dict(state))


def nhwc(x):
    return x.permute(0, 2, 3, 1)


def test_evaluation_equals_timm():
    oracle, ours, images = pair(DEEP)
    logits, features, stats = run(ours, images)
    with torch.no_grad():
        assert_close(features, nhwc(oracle.forward_features(to_torch(images))))
        assert_close(logits, oracle(to_torch(images)))
    before = trees.flat(nnx.to_pure_dict(nnx.state(ours, nnx.BatchStat)))
    for name, value in trees.flat(stats).items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize(
    ("options", "lanes", "widths"),
    [
        (SMALL, 128, [16, 32, 64, 64, 128]),  # groups of 32 are left alone, two of them become one
        (SMALL, 40, [16, 32, 64, 64, 160]),  # and four are filled up
        # One group of 24; two, three, three and seven of 28: an eighth is zeros, as of 112 and 128.
        (SMALL | {"w0": 24, "wa": 28.0, "group_width": 28}, 32, [24, 56, 96, 96, 224]),
    ],
)
def test_folded_equals_timm(options, lanes, widths):
    """Batch norm in the convolutions, whole lanes; the shapes alone give the same network."""
    oracle, ours, images = pair(options)
    ours.info = registry.model_info("regnety_testing")
    network, variables = split_model(ours)
    folded, weights = fold(network, variables, lanes=lanes)
    assert not weights.batch_stats
    found = [
        block["conv2"]["bias"].size
        for stage in ("s1", "s2", "s3", "s4")
        for block in weights.params[stage].values()
    ]
    assert found == widths
    found = jax.jit(folded)(weights, images)[0][0]
    unfolded = jax.jit(network)(variables, images)[0][0]
    np.testing.assert_allclose(found, unfolded, rtol=0, atol=1e-5 * np.abs(found).max())
    with torch.no_grad():
        assert_close(found, oracle(to_torch(images)))
    shapes = jax.eval_shape(lambda: variables)
    same, like = fold(network, shapes, lanes=lanes)
    assert same == folded
    assert jax.tree.map(jnp.shape, like) == jax.tree.map(jnp.shape, weights)


def test_training_equals_timm():
    oracle, ours, images = pair(SMALL)
    weights = np.random.default_rng(2).normal(size=(8, 7)).astype(np.float32)
    # In float64, so that the differences are our rounding alone.
    want_logits = oracle.double().train()(to_torch(images).double())
    (want_logits * torch.from_numpy(weights)).sum().backward()
    gradients = timm_models.to_tree({k: p.grad for k, p in oracle.named_parameters()})

    graphdef, params, stats = nnx.split(ours, nnx.Param, nnx.BatchStat)
    stats = nnx.to_pure_dict(stats)

    @jax.jit
    def step(params):
        def loss(params):
            model = nnx.merge(graphdef, params, stats)
            (logits,) = model.heads(images, nnx.Rngs(dropout=0))
            new_stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
            return (logits * weights).sum(), (logits, new_stats)

        return jax.grad(loss, has_aux=True)(params)

    got, (logits, stats) = step(nnx.to_pure_dict(params))
    assert_close(logits, want_logits)
    running = trees.flat(timm_models.to_tree(dict(oracle.named_buffers())))
    got_stats = trees.flat(stats)
    assert got_stats.keys() == running.keys()
    for name, value in got_stats.items():
        assert_close(value, running[name])

    got, want = trees.flat(got), trees.flat(gradients)
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        assert np.abs(want[name]).max() > 1e-4, name
        assert_close(gradient, want[name], 1e-4)


def test_training_needs_two_values_a_channel():
    with pytest.raises(InputError, match="larger batch"):
        BatchNorm(4)(jnp.ones((1, 1, 1, 4)), nnx.Rngs(0))


def test_bfloat16_keeps_float32_logits():
    oracle, model, images = pair(SMALL, dtype=jnp.bfloat16)
    got = run(model, images)[0]
    assert got.dtype == jnp.float32
    want = oracle(to_torch(images))
    assert_close(got, want, 5e-2)
    with pytest.raises(AssertionError):
        assert_close(got, want, 1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_grouped_convolution(stride):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 9, 8, 12)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 4, 12)).astype(np.float32)
    function = jax.jit(lambda x, kernel: conv3x3(x, kernel, stride=stride, groups=3))
    want = torch.nn.functional.conv2d(
        to_torch(x),
        torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()),
        stride=stride,
        padding=1,
        groups=3,
    )
    assert_close(function(x, kernel), nhwc(want), 1e-5)
    # Three dense convolutions here, one grouped one where the program is meant for a TPU.
    traced = function.trace(x, kernel)
    assert traced.lower().as_text().count("stablehlo.convolution") == 3
    tpu = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert tpu.count("stablehlo.convolution") == 1
    assert "feature_group_count = 3" in tpu


def test_initialisation():
    model = RegNetY(w0=64, wa=0.0, wm=2.0, group_width=16, depth=2, rngs=nnx.Rngs(0))
    for name, leaf in trees.flat(nnx.to_pure_dict(nnx.state(model, nnx.Param))).items():
        leaf = np.asarray(leaf)
        if name.endswith("conv/kernel"):
            fan_out = leaf.shape[0] * leaf.shape[1] * leaf.shape[3]
            tolerance = 4 / np.sqrt(2 * leaf.size)
            assert leaf.std() == pytest.approx(np.sqrt(2 / fan_out), rel=tolerance), name
        elif name == "head/fc/kernel":
            assert leaf.std() == pytest.approx(0.01, rel=0.02)
        elif name.endswith("scale"):
            assert (leaf == (0.0 if "/conv3/" in name else 1.0)).all(), name
        elif name.endswith("bias"):
            assert (leaf == 0.0).all(), name
    for name, leaf in trees.flat(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))).items():
        assert (np.asarray(leaf) == (1.0 if name.endswith("var") else 0.0)).all()
