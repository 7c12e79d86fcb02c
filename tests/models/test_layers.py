import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from numpy.testing import assert_array_equal

from deit_jax.errors import InputError
from deit_jax.models.layers import (
    Dropout,
    DropPath,
    gelu,
    product,
)
from deit_jax.models.network import split_model
from deit_jax.models.norms import BatchNorm, LayerNorm, layer_norm
from deit_jax.models.registry import create_model


@pytest.mark.parametrize(("offset", "spread", "tolerance"), [(0.0, 1e-3, 1e-5), (50.0, 1.0, 1e-4)])
def test_layer_norm_epsilon_and_exact_variance(offset, spread, tolerance):
    # A spread of 1e-3 has the variance of epsilon itself; an offset breaks the one-pass variance.
    x = offset + spread * np.random.default_rng(0).normal(size=(3, 64))
    x = x.astype(np.float32)
    wide = x.astype(np.float64)
    want = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(LayerNorm(64, dtype=jnp.float32)(x), want, atol=tolerance)


@pytest.mark.parametrize("offset", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_norm_and_its_derivative(dtype, offset):
    """Against PyTorch in float64: only the roundings of the result and of its gradient differ."""
    rng = np.random.default_rng(0)
    x = np.float32(offset + rng.normal(size=(2, 9, 64)) * np.exp(rng.normal(size=(2, 9, 1))))
    scale, bias = np.float32(rng.normal(size=(2, 64)))
    grad = jnp.asarray(rng.normal(size=x.shape), dtype)
    operands = [torch.tensor(np.float64(each), requires_grad=True) for each in (x, scale, bias)]
    want = torch.nn.functional.layer_norm(operands[0], (64,), *operands[1:], eps=1e-6)
    want.backward(torch.tensor(np.float64(grad)))
    got, backward = jax.vjp(lambda *operands: layer_norm(dtype, *operands), x, scale, bias)
    assert got.dtype == dtype
    tolerance = {jnp.float32: 1e-5, jnp.bfloat16: 4e-3}[dtype]
    np.testing.assert_allclose(np.float64(got), want.detach(), rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(backward(grad), operands, strict=True):
        assert ours.dtype == jnp.float32
        atol = 1e-4 * theirs.grad.abs().max().item()
        np.testing.assert_allclose(ours, theirs.grad, rtol=1e-3, atol=atol)


def test_batch_norm_epsilon():
    x = 3e-3 * np.random.default_rng(0).normal(size=(4, 5, 6, 2)).astype(np.float32)
    oracle = torch.nn.BatchNorm2d(2)
    want = oracle(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    got = BatchNorm(2)(jnp.asarray(x), nnx.Rngs(0))
    np.testing.assert_allclose(got, want.detach(), atol=1e-5)


def test_gelu_and_its_derivative():
    x = np.linspace(-9, 9, 1001)
    oracle = torch.tensor(x, requires_grad=True)
    want = torch.nn.functional.gelu(oracle)
    want.sum().backward()
    value, derivative = jax.jit(jax.vmap(jax.value_and_grad(gelu)))(x.astype(np.float32))
    np.testing.assert_allclose(value, want.detach(), atol=1e-6)
    np.testing.assert_allclose(derivative, oracle.grad, atol=1e-6)
    assert gelu(jnp.ones(3, jnp.bfloat16)).dtype == jnp.bfloat16


def test_product_accumulates_and_returns_gradients_in_float32():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 300, 4)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(2, 300, 3)), jnp.bfloat16).astype(jnp.float32)

    def loss(x, kernel):
        return (product("bni,io->bno", x, kernel) * weights).sum()

    x_grad, kernel_grad = jax.jit(jax.grad(loss, (0, 1)))(x, kernel)
    assert (x_grad.dtype, kernel_grad.dtype) == (jnp.bfloat16, jnp.float32)
    wide = {"x": np.float64(x), "w": np.float64(weights), "k": np.float64(kernel.astype(x.dtype))}
    want = np.einsum("bni,bno->io", wide["x"], wide["w"])
    # 600 terms: a bfloat16 accumulator or result would be off by 1e-3 and more.
    np.testing.assert_allclose(kernel_grad, want, atol=1e-5 * np.abs(want).max())
    want = np.einsum("bno,io->bni", wide["w"], wide["k"])
    np.testing.assert_allclose(np.float64(x_grad), want, rtol=2**-8, atol=1e-4)


def test_drop_path_keeps_the_expectation():
    x = jnp.ones((5000, 2, 3))
    out = np.asarray(DropPath(0.25)(x, nnx.Rngs(dropout=1)))
    assert set(np.unique(out)) == {np.float32(0), np.float32(1 / 0.75)}
    np.testing.assert_array_equal(out, out[:, :1, :1].repeat(2, 1).repeat(3, 2))  # whole samples
    assert out.mean() == pytest.approx(1.0, abs=5 * np.sqrt(0.25 / 0.75 / 5000))
    assert DropPath(0.25)(x) is x
    assert DropPath(0.0)(x, nnx.Rngs(dropout=1)) is x


NOISY = {
    "drop path": ("deit_testing", {"drop_path_rate": 0.5}),
    "dropout": ("deit_testing_distilled", {"drop_rate": 0.5}),
    "remat": ("deit_testing", {"drop_path_rate": 0.5, "remat": True}),
}
IMAGES = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)


@pytest.mark.parametrize("kind", NOISY)
def test_noise_follows_train_and_eval_or_else_the_rngs(kind):
    name, options = NOISY[kind]
    model = create_model(name, num_classes=5, depth=2, rngs=nnx.Rngs(0), **options)
    _, variables = split_model(model)
    quiet, noisy = model(IMAGES), model(IMAGES, nnx.Rngs(dropout=1))
    assert not np.allclose(noisy, quiet, atol=1e-4)
    model.eval()
    assert_array_equal(model(IMAGES, nnx.Rngs(dropout=1)), quiet)
    model.train()
    assert_array_equal(model(IMAGES, nnx.Rngs(dropout=1)), noisy)
    for call in (model, model.heads, model.forward_features):
        with pytest.raises(InputError, match=r"in training \(model.train\(\)\) but got no rngs"):
            call(IMAGES)
    views = {mode: nnx.view(model, deterministic=mode) for mode in (True, False)}
    assert_array_equal(views[True](IMAGES, nnx.Rngs(dropout=1)), quiet)
    with pytest.raises(InputError, match="no rngs"):
        views[False](IMAGES)

    # The pure function knows its mode from its key alone, and so do `predict` and the step.
    def pure(*key):
        heads, _ = split_model(model)[0](variables, IMAGES, *key)
        return sum(heads) / len(heads)

    assert_array_equal(pure(), quiet)
    model.eval()
    assert_array_equal(pure(jax.random.key(1)), noisy)


@pytest.mark.slow
def test_batch_norm_follows_train_and_eval_or_else_the_rngs():
    """As nnx.BatchNorm: after train() it uses and records the batch's statistics, without rngs."""
    model = create_model("regnety_testing", num_classes=5, rngs=nnx.Rngs(0))

    def statistics():
        return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))["stem"]["bn"]["mean"]

    quiet, before = model(IMAGES), statistics()
    model.eval()
    assert_array_equal(model(IMAGES, nnx.Rngs(0)), quiet)
    assert_array_equal(statistics(), before)
    model.train()
    noisy = model(IMAGES)
    assert not np.allclose(noisy, quiet, atol=1e-4)
    assert not np.array_equal(statistics(), before)
    network, variables = split_model(model)
    heads, after = network(variables, IMAGES)
    assert not np.allclose(heads[0], noisy, atol=1e-4)  # the pure function evaluates without a key
    assert_array_equal(after["stem"]["bn"]["mean"], variables.batch_stats["stem"]["bn"]["mean"])
    model.eval()
    network, _ = split_model(model)
    np.testing.assert_allclose(
        network(variables, IMAGES, jax.random.key(0))[0][0], noisy, atol=1e-5
    )


def test_the_modes_are_those_of_nnx():
    """nnx's own layers in our place: what raises, what records, and what ignores the rngs."""
    ours, theirs = Dropout(0.5), nnx.Dropout(0.5)
    x = jnp.ones((3, 4))
    for layer in (ours, theirs):
        layer.train()
        with pytest.raises(ValueError, match="rngs"):
            layer(x)
        layer.eval()
        assert_array_equal(layer(x, rngs=nnx.Rngs(0)), x)
    assert_array_equal(ours(x), x)
    ours, theirs = BatchNorm(2), nnx.BatchNorm(2, epsilon=1e-5, momentum=0.9, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (4, 5, 6, 2)), jnp.float32)
    for mode in ("train", "eval"):
        for layer in (ours, theirs):
            getattr(layer, mode)()
        np.testing.assert_allclose(ours(x), theirs(x), atol=2e-2 if mode == "eval" else 1e-5)
