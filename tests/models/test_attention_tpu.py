"""The Pallas kernels for TPUs, interpreted on this machine, beside float64 in PyTorch."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from deit_jax.errors import InputError
from deit_jax.models import attention, attention_tpu
from deit_jax.parallel import devices
from deit_jax.training import kernels
from tests.training import steps

LONGER = 320  # than the queries that the kernels take at a time


def exact(num_heads, qkv, grad):
    """Attention of qkv [B, N, 3D] and the gradient of qkv, by PyTorch in float64."""
    qkv = torch.from_numpy(np.asarray(qkv, np.float64)).requires_grad_()
    batch, tokens, width = qkv.shape
    parts = qkv.reshape(batch, tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    out = torch.nn.functional.scaled_dot_product_attention(*parts)
    out = out.transpose(1, 2).reshape(batch, tokens, width // 3)
    out.backward(torch.from_numpy(np.asarray(grad, np.float64)))
    return out.detach().numpy(), qkv.grad.numpy()


def error(found, want):
    return float(np.linalg.norm(np.asarray(found, np.float64) - want) / np.linalg.norm(want))


@pytest.mark.parametrize("interpret", [True, False], ids=["kernels", "formulas"])
@pytest.mark.parametrize(
    ("images", "tokens", "num_heads", "head_dim", "absent"),
    [
        (1, 37, 2, 64, 0),
        (2, 37, 2, 64, 3),
        pytest.param(2, 197, 4, 64, 3, marks=pytest.mark.slow),  # two groups of lanes
        (2, 20, 3, 64, 0),  # a group with room for another head
        (2, 17, 3, 32, 7),
        (2, 16, 1, 128, 0),
        (4, 16, 8, 64, 0),  # two programs of two images
        pytest.param(2, LONGER, 2, 64, 0, marks=pytest.mark.slow),
        pytest.param(2, LONGER - 5, 2, 64, 5, marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_are_as_exact_as_those_of_xla(
    images, tokens, num_heads, head_dim, absent, interpret
):
    """Whatever the rows that are no tokens hold."""
    width = num_heads * head_dim
    rng = np.random.default_rng(0)
    projected = (1.5 * rng.normal(size=(images, tokens, 3 * width))).astype(np.float32)
    bias, grad = rng.normal(size=3 * width), rng.normal(size=(images, tokens, width))
    bias, grad = bias.astype(np.float32), jnp.asarray(grad, jnp.bfloat16)
    want, want_grad = exact(num_heads, projected + bias, grad)
    no_heads = attention_tpu.padded(num_heads, head_dim) - width
    rows = [(0, 0), (0, absent), (0, 0)]
    sequences = attention.Sequences(num_heads, head_dim, tokens + absent, absent)

    def kernels(projected, bias):
        pad = functools.partial(attention._pad_parts, absent=no_heads)
        projected = pad(jnp.pad(projected, rows, constant_values=30.0))
        projected = projected.reshape(-1, projected.shape[-1])
        out = attention.attend_in_vmem(sequences, interpret, projected, pad(bias))
        return out.reshape(images, tokens + absent, -1)[:, :tokens, :width]

    def xla(projected, bias):
        qkv = (projected + bias[None, None]).astype(jnp.bfloat16)
        qkv = jnp.pad(qkv, rows, constant_values=30.0)
        return attention.attend(num_heads, qkv, absent)[:, :tokens]

    errors = []
    for function in (kernels, xla):
        out, gradient = jax.vjp(function, projected, bias)
        projected_grad, bias_grad = gradient(grad)
        assert out.dtype == jnp.bfloat16
        found = [(out, want), (projected_grad, want_grad), (bias_grad, want_grad.sum((0, 1)))]
        errors.append([error(*pair) for pair in found])
    assert max(errors[0]) < 0.02
    # 1.1 is a rounding more or less; the sums of a bias are few numbers.
    for kernel, other in list(zip(*errors, strict=True))[:2]:
        assert kernel <= 1.1 * other


def test_what_the_kernels_take():
    assert attention_tpu.fits(577, 16, 64)
    assert not attention_tpu.fits(257, 16, 80)  # DeiT III-H
    assert not attention_tpu.fits(5000, 16, 64)
    assert not attention_tpu.fits(197, 24, 8)  # less than a tile of rows, once transposed


@pytest.mark.parametrize(
    ("batch", "tokens", "width", "images"),
    [
        (128, 200, 384, 4),
        (64, 200, 768, 2),
        (6, 200, 384, 2),
        (3, 200, 384, 1),
        (64, 200, 1024, 1),  # of two the TPU compiler finds no room for what it keeps
        (16, 584, 384, 1),
    ],
)
def test_how_many_images_a_program_takes(batch, tokens, width, images):
    assert attention_tpu._images(batch, tokens, width) == images


@pytest.mark.parametrize("width", [128, 256, 384, 768, 1024])
def test_the_trial_is_of_programs_as_large_as_any(width):
    """Or a run could meet a program of more images that the trial at its start did not try."""
    images = kernels._IMAGES
    assert attention_tpu._images(images, 40, width) == attention_tpu._images(1024, 40, width)


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ({"dtype": "float32"}, "compute in bfloat16, but dtype is float32"),
        ({"embed_dim": 80, "num_heads": 1}, "no room for 65 tokens of 1 heads of 80"),
    ],
)
def test_what_they_do_not_take_is_refused(options, answer):
    with pytest.raises(InputError, match=answer):
        steps.new_model("deit_testing", **{"dtype": "bfloat16", "attention": "pallas"} | options)


@pytest.fixture
def on_tpus():
    """As within a program for one TPU, for whatever is traced."""
    chip = types.SimpleNamespace(platform="tpu")
    mesh = types.SimpleNamespace(size=1, devices=np.array([chip]))
    with devices.of(mesh):
        yield


def lowered(platform, name="deit_testing", dtype="bfloat16", **options):
    """A training pass and its gradient as XLA for a platform gets them."""
    network, variables = steps.new_model(name, depth=1, dtype=dtype, **options)
    images = jnp.zeros((2, 32, 32, 3))

    def loss(variables):
        return network(variables, images, jax.random.key(0))[0][0].sum()

    return jax.jit(jax.grad(loss)).trace(variables).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.usefixtures("on_tpus")
@pytest.mark.parametrize("platform", ["tpu", "cpu", "cuda"])
@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 2),
        ({"dtype": "float32"}, 0),
        ({"attention": "xla"}, 0),
        ({"remat": True}, 3),
        ({"name": "vit5_testing"}, 2),
    ],
)
def test_auto_is_the_kernels_on_tpus_alone(platform, options, count):
    """Also where a program that was traced for TPUs is compiled for something else."""
    want = count if platform == "tpu" else 0
    assert lowered(platform, **options).count("tpu_custom_call") == want


@pytest.mark.usefixtures("on_tpus")
def test_between_kernels_the_stream_lies_as_the_compiler_likes():
    """Without them libtpu 0.0.50 aborts at 384 pixels, unless the layout is asked for."""
    assert "@LayoutConstraint" not in lowered("tpu")
    assert "@LayoutConstraint" in lowered("tpu", attention="xla")
    assert "@LayoutConstraint" in lowered("tpu", dtype="float32")
    assert "@LayoutConstraint" not in lowered("cpu", attention="xla")


@pytest.mark.parametrize(("chips", "count"), [(1, 2), (4, 0)])
def test_without_a_mesh_the_only_device_has_kernels(monkeypatch, chips, count):
    """Of several devices a program may use one or all; a kernel would have to be told."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: chips)
    assert lowered("tpu").count("tpu_custom_call") == count


def losses_and_gradients(name, **options):
    network, variables = steps.new_model(name, depth=2, **options)
    sharper = jax.tree.map(lambda x: 2.5 * x if x.ndim == 2 else x, variables)
    sharper = jax.tree_util.tree_map_with_path(  # a fresh LayerScale hides the branches
        lambda path, x: jnp.ones_like(x) if "gamma" in str(path[-1]) else x, sharper
    )
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))

    @jax.jit
    def loss(variables):
        heads, _ = network(variables, images, jax.random.key(2))
        return sum(jnp.square(head - 1).mean() for head in heads)

    value, grads = jax.value_and_grad(loss)(sharper)
    return float(value), np.concatenate([np.ravel(x) for x in jax.tree.leaves(grads)])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["deit_testing_distilled", "vit_testing_rope_mixed_ape", "vit5_testing"]
)
def test_a_model_is_as_exact_with_kernels_as_without(name):
    """Losses and gradients beside float32, with attention that is not uniform; also with remat."""
    want, want_grads = losses_and_gradients(name)
    bfloat16 = functools.partial(losses_and_gradients, name, dtype="bfloat16", drop_path_rate=0.0)
    errors = {}
    for name, options in {
        "xla": {"attention": "xla"},
        "pallas": {"attention": "pallas"},
        "remat": {"attention": "pallas", "remat": True},
    }.items():
        value, grads = bfloat16(**options)
        errors[name] = abs(value / want - 1), error(grads, want_grads)
    assert errors["pallas"][0] < 0.01
    assert errors["pallas"][1] <= 1.1 * errors["xla"][1]
    assert errors["remat"] == pytest.approx(errors["pallas"], rel=0.1)
