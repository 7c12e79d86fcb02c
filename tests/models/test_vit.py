import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from deit_jax import trees
from deit_jax.models.vit import VisionTransformer
from tests.oracles import timm_models

SMALL = {
    "image_size": 16,
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 7,
}
DEIT3 = {"no_embed_class": True, "layer_scale_init": 1e-4}
VARIANTS = {
    "plain": {},
    "distilled": {"distilled": True},
    "deit3": DEIT3,
    "rope": DEIT3 | {"rope": "axial", "pos_embed": False, "image_size": (16, 24)},
    "rope_ape": DEIT3 | {"rope": "axial", "image_size": (24, 16)},
    "rope_mixed": DEIT3 | {"rope": "mixed", "pos_embed": False, "image_size": (16, 24)},
    # Neither side is a multiple of the patch: the last pixels are dropped.
    "odd": {"image_size": (19, 14), "distilled": True},
}


def pair(variant, **more):
    """Return timm's model and ours with the same weights, and images for both."""
    options = SMALL | VARIANTS[variant]
    oracle = timm_models.vit(**options)
    build = functools.partial(VisionTransformer, **options, **more)
    ours = timm_models.with_weights_of(oracle, build)
    images = np.random.default_rng(1).normal(size=(5, *ours.image_size, 3)).astype(np.float32)
    return oracle, ours, images


def run(model, images):
    """Return (logits, heads, features) of one evaluation pass, compiled once."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def outputs(state):
        model = nnx.merge(graphdef, state)
        return model(images), model.heads(images), model.forward_features(images)

    return outputs(nnx.to_pure_dict(state))


def to_torch(images):
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def oracle_heads(oracle, images):
    if isinstance(oracle, timm_models.VisionTransformerDistilled):
        oracle.set_distilled_training(True)
        heads = oracle.train()(to_torch(images))
        oracle.eval()
        return heads
    return (oracle(to_torch(images)),)


def assert_close(got, want, tolerance=2e-5):
    """Compare with a tolerance relative to the largest magnitude of the expected array."""
    got, want = np.asarray(got), np.asarray(want.detach() if torch.is_tensor(want) else want)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def check_attention_maxima(oracle, ours, images, monkeypatch):
    """Compares them with the logits that each softmax of timm's gets."""
    seen = []
    softmax = torch.Tensor.softmax

    def watch(logits, *arguments, **options):
        seen.append(logits.abs().max().item())
        return softmax(logits, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "softmax", watch)
    for module in oracle.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with torch.no_grad():
        oracle(to_torch(images))
    assert len(seen) >= SMALL["depth"]
    np.testing.assert_allclose(ours.attention_maxima(images), seen, rtol=1e-4)


def check_bfloat16(oracle, model, images, *, products):
    """Of a model of two blocks, each with more than so many products."""
    logits, _, features = run(model, images)
    wanted = oracle(to_torch(images)), oracle.forward_features(to_torch(images))
    for got, want in zip((logits, features), wanted, strict=True):
        assert got.dtype == jnp.float32
        assert_close(got, want, 5e-2)
        with pytest.raises(AssertionError):
            assert_close(got, want, 1e-4)

    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        return sum((head**2).sum() for head in nnx.merge(graphdef, params, rest).heads(images))

    gradient = jax.jit(jax.grad(loss))
    params = nnx.to_pure_dict(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient(params))} == {jnp.dtype("float32")}
    # Every product, forward and backward, has bfloat16 operands and accumulates in float32.
    types = re.findall(
        r"stablehlo.dot_general.* : \(tensor<(?:\d+x)+(\w+)>, tensor<(?:\d+x)+(\w+)>\)"
        r" -> tensor<(?:\d+x)+(\w+)>",
        gradient.lower(params).as_text(),
    )
    assert len(types) > 2 * 3 * products
    assert set(types) == {("bf16", "bf16", "f32")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_equal_timm(variant):
    # Without a key there is no noise either.
    oracle, ours, images = pair(variant, drop_rate=0.1, drop_path_rate=0.5)
    logits, heads, features = run(ours, images)
    assert logits.dtype == jnp.float32
    assert_close(features, oracle.forward_features(to_torch(images)))
    assert_close(logits, oracle(to_torch(images)))
    assert len(heads) == (2 if VARIANTS[variant].get("distilled") else 1)
    for got, want in zip(heads, oracle_heads(oracle, images), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("variant", ["plain", "distilled", "deit3", "rope", "rope_mixed"])
def test_every_gradient_equals_torch(variant):
    oracle, ours, images = pair(variant)
    heads = oracle_heads(oracle, images)
    weights = np.random.default_rng(2).normal(size=(len(heads), 5, 7)).astype(np.float32)
    sum(
        (head * torch.from_numpy(w)).sum() for head, w in zip(heads, weights, strict=True)
    ).backward()
    want = trees.flat(timm_models.to_tree({k: p.grad for k, p in oracle.named_parameters()}))

    graphdef, params = nnx.split(ours)

    def loss(params):
        heads = nnx.merge(graphdef, params).heads(images)
        return sum((head * w).sum() for head, w in zip(heads, weights, strict=True))

    got = trees.flat(jax.jit(jax.grad(loss))(nnx.to_pure_dict(params)))
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        assert np.abs(want[name]).max() > 1e-3, name
        assert_close(gradient, want[name], 5e-5)


@pytest.mark.parametrize("variant", ["distilled", "deit3", "rope_mixed"])
def test_attention_maxima_are_those_of_timms_softmax(variant, monkeypatch):
    check_attention_maxima(*pair(variant), monkeypatch)


def test_bfloat16_keeps_float32_where_it_matters():
    check_bfloat16(*pair("distilled", dtype=jnp.bfloat16), products=6)


@pytest.mark.parametrize(
    ("variant", "mode", "rates"),
    [("distilled", "linear", [0, 0.2, 0.4]), ("deit3", "constant", [0.4] * 3)],
)
def test_every_branch_of_a_model_is_dropped_by_itself_at_its_rate(variant, mode, rates):
    options = SMALL | {"image_size": 4, "depth": 3, "drop_path_rate": 0.4} | VARIANTS[variant]
    build = functools.partial(VisionTransformer, **options, drop_path_mode=mode)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), nnx.to_pure_dict(shapes))
    params["norm"]["scale"] += 1
    for number, block in params["blocks"].items():  # each branch adds to a channel of its own
        block["attn"]["proj"]["bias"][2 * number] = 1
        block["mlp"]["fc2"]["bias"][2 * number + 1] = 1
        for scale in (block[key] for key in ("ls1", "ls2") if key in block):
            scale["gamma"] += 1

    @jax.jit
    def channels(key):
        images = jnp.zeros((3000, 4, 4, 3))
        model = nnx.merge(graphdef, params)
        return model.forward_features(images, nnx.Rngs(dropout=key))[:, 0]

    tokens = np.asarray(channels(jax.random.key(0)))
    dropped = np.float64(tokens[:, :6] <= tokens[:, 6:7])  # the seventh channel has stayed 0
    want = np.repeat(rates, 2)
    assert (np.abs(dropped.mean(0) - want) <= 5 * np.sqrt(want * (1 - want) / 3000)).all()
    together = dropped.T @ dropped / 3000 - np.outer(dropped.mean(0), dropped.mean(0))
    assert np.abs(together - np.diag(np.diag(together))).max() < 5 * 0.4 * 0.6 / np.sqrt(3000)


def test_initialisation():
    options = {"embed_dim": 192, "depth": 2, "num_heads": 3}
    model = VisionTransformer(**options, distilled=True, layer_scale_init=1e-4, rngs=nnx.Rngs(0))
    leaves = trees.flat(nnx.to_pure_dict(nnx.state(model)))
    bound = 1 / np.sqrt(3 * 16 * 16)
    for name, leaf in leaves.items():
        leaf = np.asarray(leaf)
        assert leaf.dtype == np.float32
        if name.startswith("patch_embed"):
            assert np.abs(leaf).max() <= bound
            assert leaf.std() == pytest.approx(bound / np.sqrt(3), rel=0.1)
            assert np.abs(leaf).max() > 0.95 * bound
        elif name.endswith(("kernel", "token", "pos_embed")):
            assert leaf.std() == pytest.approx(0.02, rel=max(0.01, 4 / np.sqrt(2 * leaf.size)))
            assert np.abs(leaf.mean()) < 5 * 0.02 / np.sqrt(leaf.size)
            # Not truncated at two standard deviations.
            assert np.abs(leaf).max() > 0.045
        else:
            constant = {"scale": 1.0, "bias": 0.0, "gamma": 1e-4}[name.split("/")[-1]]
            np.testing.assert_array_equal(leaf, np.float32(constant))
    kernels = [leaf for name, leaf in leaves.items() if name.endswith("attn/proj/kernel")]
    assert not np.array_equal(*kernels)


def multiplications(lowered):
    """Those of all products of a lowered program."""
    total = 0
    for line in re.findall(r"stablehlo\.dot_general (.*)", lowered):
        contracted = re.search(r"contracting_dims = \[([\d, ]+)\]", line)[1]
        shapes = [shape.split("x")[:-1] for shape in re.findall(r"tensor<(\w+)>", line)]
        sizes = shapes[2] + [shapes[0][int(axis)] for axis in contracted.split(",")]
        total += np.prod([int(size) for size in sizes])
    return total


def test_a_plain_model_has_no_operation_of_the_switches():
    """DeiT III's passes, operation by operation: what a rotation or a register adds is seen."""

    def operations(gradients=False, **switches):
        options = SMALL | DEIT3 | switches
        model = nnx.eval_shape(lambda: VisionTransformer(**options, rngs=nnx.Rngs(0)))
        graphdef, state = nnx.split(model)
        images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)

        def loss(state, images):
            return (nnx.merge(graphdef, state)(images) ** 2).sum()

        function = jax.value_and_grad(loss) if gradients else loss
        lowered = jax.jit(function).lower(state, images).as_text()
        return collections.Counter(re.findall(r"= stablehlo\.(\w+)", lowered)), lowered

    plain, _ = operations()
    # A patch embedding, six products in each of two blocks, a head; five norms; one sequence.
    assert plain["dot_general"] == 1 + 2 * 6 + 1
    assert plain["rsqrt"] == 5
    assert plain["concatenate"] == 1
    assert not {"sine", "cosine", "optimization_barrier", "pad"} & plain.keys()
    step, lowered = operations(gradients=True)
    # Backward: two products for each, but no gradient of the images, and the scores once more.
    assert step["dot_general"] == 14 + (2 * 14 - 1) + 2
    assert step["rsqrt"] == 5
    assert not {"sine", "cosine", "optimization_barrier", "gather", "scatter"} & step.keys()
    batch, tokens, width, heads = 2, 17, 32, 4
    embed, head = batch * (tokens - 1) * 48 * width, batch * width * 7
    scores = batch * heads * tokens**2 * (width // heads)
    block = batch * tokens * (4 * width**2 + 8 * width**2) + 2 * scores
    assert multiplications(lowered) == 3 * (embed + 2 * block + head) - embed + 2 * scores
    for switch in ({"rope": "axial"}, {"rope": "mixed"}, {"num_registers": 1}, {"qk_norm": True},
                   {"norm": "rms"}, {"qkv_bias": False}, {"linear_bias": False},
                   {"pos_embed": False}):  # fmt: skip
        assert operations(**switch)[0] != plain, switch
