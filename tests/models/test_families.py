"""The models beside DeiT's against timm: one table of kinds, small, with weights of full effect."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from deit_jax import trees
from deit_jax.models import registry
from tests.models.test_vit import (
    assert_close,
    check_attention_maxima,
    check_bfloat16,
    run,
    to_torch,
)
from tests.oracles import timm_models

SMALL = {"image_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 7}
KINDS = {
    "parallel": ("parallel_testing", {}),
    "parallel, of timm": ("parallel_testing", {"no_embed_class": False, "layer_scale_init": None}),
    "hmlp": ("hmlp_testing", {"image_size": (53, 35)}),  # the last pixels are in no patch
    "cait": ("cait_testing", {}),
    # Heads of 8, one class block and neither side a multiple of the patch.
    "cait, odd": ("cait_testing", {"image_size": (19, 14), "depth_token_only": 1}),
    "resmlp": ("resmlp_testing", {}),
    "resmlp, odd": ("resmlp_testing", {"image_size": (19, 14)}),
}


def options_of(kind, **more):
    name, own = KINDS[kind]
    options = SMALL | own | more
    if "resmlp" in kind:
        del options["num_heads"]
    return name, options


def pair(kind, **more):
    """Returns timm's model and ours with the same weights, and images for both."""
    name, options = options_of(kind)
    oracle = timm_models.randomise(timm_models.fresh(name, **options), seed=0)
    build = functools.partial(registry.create_model, name, **options, **more)
    ours = timm_models.with_weights_of(oracle, build)
    images = np.random.default_rng(1).normal(size=(5, *ours.image_size, 3)).astype(np.float32)
    return oracle, ours, images


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_equal_timm(kind, remat):
    # Without a key there is no noise either.
    oracle, ours, images = pair(kind, drop_rate=0.1, drop_path_rate=0.5, remat=remat)
    logits, heads, features = run(ours, images)
    assert logits.dtype == jnp.float32
    assert_close(features, oracle.forward_features(to_torch(images)))
    assert_close(logits, oracle(to_torch(images)))
    assert len(heads) == 1
    np.testing.assert_array_equal(heads[0], logits)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_gradient_equals_torch(kind, remat):
    oracle, ours, images = pair(kind, remat=remat)
    weights = np.random.default_rng(2).normal(size=(5, 7)).astype(np.float32)
    (oracle(to_torch(images)) * torch.from_numpy(weights)).sum().backward()
    want = trees.flat(timm_models.to_tree({k: p.grad for k, p in oracle.named_parameters()}))
    graphdef, params, rest = nnx.split(ours, nnx.Param, ...)

    def loss(params):
        return (nnx.merge(graphdef, params, rest)(images) * weights).sum()

    got = trees.flat(jax.jit(jax.grad(loss))(nnx.to_pure_dict(params)))
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        # These move all logits of a softmax by one number: they change nothing but rounding.
        if name.endswith(("attn/k/bias", "attn/proj_l/bias")):
            assert np.abs(gradient).max() < 1e-4
            continue
        assert np.abs(want[name]).max() > 1e-3, name
        assert_close(gradient, want[name], 5e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "resmlp" not in kind])
def test_attention_maxima_are_those_of_timms_softmax(kind, monkeypatch):
    check_attention_maxima(*pair(kind), monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_keeps_float32_where_it_matters(kind):
    check_bfloat16(*pair(kind, dtype=jnp.bfloat16), products=3)


# Which branches of a block add to the features of the token (or patch) that is looked at, and which
# of them are never dropped.
BRANCHES = {
    "parallel": (
        [f"{path}/bias" for i in "01" for path in (f"attns/{i}/attn/proj", f"ffns/{i}/mlp/fc2")],
        [],
        0,
    ),
    "cait": (["attn/proj/bias", "mlp/fc2/bias"], ["blocks_token_only"], 1),
    "resmlp": (["linear_tokens/bias", "mlp_channels/fc2/bias"], [], 0),
}


@pytest.mark.parametrize("kind", BRANCHES)
def test_every_branch_is_dropped_by_itself_at_one_rate(kind):
    branches, never, token = BRANCHES[kind]
    name, options = options_of(kind, image_size=4, drop_path_rate=0.4)
    build = functools.partial(registry.abstract_model, name, **options)
    graphdef, shapes, rest = nnx.split(build(), nnx.Param, ...)
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), nnx.to_pure_dict(shapes))
    flat = trees.flat(params)
    flat["norm/scale"] += 1
    number = 0
    for leaf in [leaf for leaf in flat if leaf.endswith("gamma")]:
        flat[leaf] += 1
    for leaf in flat:  # each branch adds to a channel of its own
        if not leaf.startswith("blocks/") or not leaf.endswith(tuple(branches)):
            continue
        if "linear_tokens" in leaf:  # its bias is of a patch
            flat[leaf] += 1
            leaf = leaf.replace("linear_tokens/bias", "ls1/gamma")
            flat[leaf] -= 1
        flat[leaf][number] = 1
        number += 1
    assert number == SMALL["depth"] * len(branches)
    assert all(any(leaf.startswith(prefix) for leaf in flat) for prefix in never)

    @jax.jit
    def channels(key):
        model = nnx.merge(graphdef, params, rest)
        images = jnp.zeros((3000, 4, 4, 3))
        return model.forward_features(images, nnx.Rngs(dropout=key))[:, token]

    tokens = np.asarray(channels(jax.random.key(0)))
    dropped = np.float64(tokens[:, :number] <= tokens[:, number : number + 1])
    assert (np.abs(dropped.mean(0) - 0.4) <= 5 * np.sqrt(0.4 * 0.6 / 3000)).all()
    together = dropped.T @ dropped / 3000 - np.outer(dropped.mean(0), dropped.mean(0))
    assert np.abs(together - np.diag(np.diag(together))).max() < 5 * 0.4 * 0.6 / np.sqrt(3000)
    for prefix in never:
        blocks = getattr(build(), prefix)
        assert [block.drop_path.rate for block in blocks] == [0.0] * len(blocks)


@pytest.mark.parametrize("kind", KINDS)
def test_initial_weights(kind):
    """Those of the reference: normal ones; a convolution as PyTorch's, and constants."""
    name, options = options_of(kind, embed_dim=192, image_size=32)
    options["layer_scale_init"] = 0.25
    model = registry.create_model(name, **options, rngs=nnx.Rngs(0))
    leaves = trees.flat(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    for leaf, value in leaves.items():
        value, last = np.asarray(value, np.float64), leaf.split("/")[-1]
        kernel = leaf.replace("bias", "kernel")
        stem = leaf.startswith(("patch_embed", "stem"))
        if stem and last != "scale" and kernel in leaves:
            bound = np.prod(leaves[kernel].shape[:3]) ** -0.5
            assert np.abs(value).max() <= bound
            assert value.std() == pytest.approx(bound / np.sqrt(3), rel=0.25), leaf
        elif last in ("kernel", "cls_token", "pos_embed"):
            assert value.std() == pytest.approx(0.02, rel=max(0.02, 4 / np.sqrt(2 * value.size)))
            assert abs(value.mean()) < 5 * 0.02 / np.sqrt(value.size), leaf
        else:
            want = {"scale": 1.0, "bias": 0.0, "gamma": 0.25}[last]
            np.testing.assert_array_equal(value, want, err_msg=leaf)
