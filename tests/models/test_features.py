"""Features, feature maps and attention against timm, small, with weights of full effect."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from timm.layers import resample_abs_pos_embed

from deit_jax import load_model, save_model, trees
from deit_jax.errors import InputError
from deit_jax.models import registry
from tests.models.test_vit import assert_close, to_torch
from tests.oracles import timm_models

SMALL = {"image_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 7}
KINDS = {
    "deit": "deit_testing",
    "distilled": "deit_testing_distilled",
    "deit3": "deit3_testing",
    "parallel": "parallel_testing",
    "hmlp": "hmlp_testing",
    "rope": "vit_testing_rope",
    "rope mixed": "vit_testing_rope_mixed_ape",
    "vit5": "vit5_testing",
    "cait": "cait_testing",
    "resmlp": "resmlp_testing",
    "regnety": "regnety_testing",
}
TOKENS = [kind for kind in KINDS if kind != "regnety"]
ATTENTION = [kind for kind in TOKENS if kind != "resmlp"]


@functools.cache
def pair(kind, **more):
    """Returns timm's model and ours with the same weights, and images for both."""
    options = SMALL | ({"image_size": 32} if kind == "hmlp" else {})
    absent = {"resmlp": {"num_heads"}, "regnety": {"image_size", "embed_dim", "depth", "num_heads"}}
    options = {k: v for k, v in options.items() if k not in absent.get(kind, ())}
    oracle = timm_models.fresh(KINDS[kind], **options, **more)
    oracle = timm_models.randomise(oracle, seed=0)
    abstract = registry.abstract_model(KINDS[kind], **options)
    graph, like = nnx.split(abstract)
    constants = ("attn.rope.freqs", "attn.rope_reg.freqs")
    tensors = {k: v for k, v in oracle.state_dict().items() if not k.endswith(constants)}
    tree = timm_models.to_tree(tensors)
    trees.check_like(tree, nnx.to_pure_dict(like), "timm's weights")
    ours = nnx.merge(graph, jax.tree.map(jnp.asarray, tree))
    side = options.get("image_size", 37)
    images = np.random.default_rng(1).normal(size=(3, side, side, 3)).astype(np.float32)
    return oracle, ours, images


def outputs_of(oracle, images, modules):
    """Returns what torch's modules return in one pass, in the order of their calls."""
    found = []
    hooks = [m.register_forward_hook(lambda m, x, out: found.append(out)) for m in modules]
    with torch.no_grad():
        oracle(to_torch(images))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_pooled_features_are_what_timms_heads_read(kind):
    oracle, ours, images = pair(kind)
    with torch.no_grad():
        want = oracle.forward_features(to_torch(images))
        want = want[:, 0] if kind == "vit5" else oracle.forward_head(want, pre_logits=True)
    assert ours.num_features == want.shape[1]
    assert_close(jax.jit(ours.features)(images), want)


@pytest.mark.parametrize("kind", TOKENS)
def test_maps_and_tokens_of_blocks_equal_timms(kind):
    oracle, ours, images = pair(kind)
    raw = outputs_of(oracle, images, oracle.blocks)
    if kind in ("hmlp", "vit5"):  # timm has no such method of them
        patches, grid = (slice(1, None), (2, 2)) if kind == "hmlp" else (slice(1, -4), (4, 4))
        maps = [oracle.norm(raw[block])[:, patches].unflatten(1, grid) for block in (0, 2)]
    else:
        how = {"norm": True, "intermediates_only": True}
        maps = oracle.forward_intermediates(to_torch(images), indices=[0, 2], **how)
        maps = [x.permute(0, 2, 3, 1) for x in maps]

    @jax.jit
    def run(images):
        plain = ours.intermediates(images, 2, normalize=False, reshape=False)
        return ours.intermediates(images, [0, -1]), plain

    for got, want in zip(*(run(images)[0], maps), strict=True):
        assert_close(got, want)
    for got, want in zip(run(images)[1], raw[1:], strict=True):
        assert_close(got, want)


def test_maps_of_regnety_equal_timms():
    oracle, ours, images = pair("regnety")
    with torch.no_grad():
        want = oracle.forward_intermediates(to_torch(images), intermediates_only=True)
    got = jax.jit(ours.intermediates)(images)
    assert len(got) == 5
    for ours_, timms in zip(got, want, strict=True):
        assert_close(ours_, timms.permute(0, 2, 3, 1))
    np.testing.assert_array_equal(ours.intermediates(images, [2, 0])[1], ours.stem(images))


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_weights_and_rollout_equal_timms(kind, monkeypatch):
    oracle, ours, images = pair(kind)
    seen = []
    softmax = torch.Tensor.softmax

    def watch(logits, *arguments, **options):
        seen.append(softmax(logits, *arguments, **options))
        return seen[-1]

    monkeypatch.setattr(torch.Tensor, "softmax", watch)
    monkeypatch.setattr(torch, "softmax", watch)
    for module in oracle.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    mixers = [block.attn.proj_w for block in oracle.blocks] if kind == "cait" else []
    mixed = outputs_of(oracle, images, mixers)
    want = [x.detach().numpy() for x in seen]
    if kind == "parallel":
        want = [np.concatenate(branches, 1) for branches in zip(want[::2], want[1::2], strict=True)]
    if kind == "cait":
        want = [x.permute(0, 3, 1, 2).numpy() for x in mixed] + [x for x in want if x.shape[2] == 1]
        assert [x.shape[2] for x in want] == [16, 16, 16, 1, 1]
    got = jax.jit(ours.attention_weights)(images)
    for ours_, timms in zip(got, want, strict=True):
        assert_close(ours_, timms)
    if kind == "cait":
        with pytest.raises(InputError, match="a Cait has no attention whose weights sum to 1"):
            ours.attention_rollout(images)
        return

    chosen, product = [0, 2], np.eye(want[0].shape[-1])
    for weights in (want[block].astype(np.float64) for block in chosen):
        heads = sum(weights[:, head] for head in range(weights.shape[1])) / weights.shape[1]
        product = (0.5 * heads + 0.5 * np.eye(len(product[-1]))) @ product
    rollout = jax.jit(lambda images: ours.attention_rollout(images, [2, 0]))(images)
    assert_close(rollout, product)
    patches = rollout[:, 0, ours.patch_tokens].shape[1]
    assert patches == np.prod([side // ours.patch_size for side in images.shape[1:3]])


@pytest.mark.parametrize("kind", ATTENTION)
def test_any_image_size_equals_timm(kind):
    timms = kind in ("deit", "distilled", "deit3", "parallel", "rope", "rope mixed")
    oracle, ours, images = pair(kind, **({"dynamic_img_size": True} if timms else {}))
    graph, state = nnx.split(ours)
    ours = nnx.merge(graph, state)
    patch = ours.patch_size
    rows, columns = (2, 3) if kind == "hmlp" else (3, 6)
    size = rows * patch, columns * patch
    images = np.random.default_rng(2).normal(size=(2, *size, 3)).astype(np.float32)
    with pytest.raises(InputError, match="dynamic_image_size"):
        ours.features(images)
    ours.dynamic_image_size = True
    outputs = jax.jit(lambda x: (ours(x), ours.forward_features(x), *ours.intermediates(x, 1)))
    logits, features, last = outputs(images)
    assert last.shape == (2, rows, columns, 32)
    if timms:
        with torch.no_grad():
            assert_close(features, oracle.forward_features(to_torch(images)))
            assert_close(logits, oracle(to_torch(images)))
        return

    params = nnx.to_pure_dict(state)  # a model of that size, positions resampled by timm
    prefix = 1 if kind == "deit" else 0
    learned = torch.from_numpy(np.array(params["pos_embed"]))
    params["pos_embed"] = jnp.asarray(
        resample_abs_pos_embed(learned, [rows, columns], num_prefix_tokens=prefix).numpy()
    )
    options = SMALL | {"image_size": size}
    other, like = nnx.split(registry.abstract_model(KINDS[kind], **options))
    trees.check_like(params, nnx.to_pure_dict(like), "resampled")
    other = nnx.merge(other, params)
    assert_close(features, other.forward_features(images))
    assert_close(logits, other(images))


def test_gradients_reach_resampled_positions():
    _, ours, _ = pair("deit3")
    graph, params = nnx.split(ours)
    images = np.random.default_rng(2).normal(size=(1, 24, 24, 3)).astype(np.float32)

    def loss(params):
        model = nnx.merge(graph, params)
        model.dynamic_image_size = True
        return model(images).sum()

    gradient = jax.grad(loss)(nnx.to_pure_dict(params))["pos_embed"]
    assert (np.abs(gradient).max(-1) > 0).all()


@pytest.mark.parametrize("kind", ["distilled", "cait", "vit5", "resmlp", "regnety"])
def test_under_vmap_all_is_as_for_each_image(kind):
    _, ours, images = pair(kind)

    def all_of(images):
        weights = ours.attention_weights(images, 1) if ours.has_attention else []
        return ours(images), ours.features(images), ours.intermediates(images, 1), weights

    mapped = jax.jit(jax.vmap(lambda image: all_of(image[None])))(images)
    for got, want in zip(*map(jax.tree.leaves, (mapped, all_of(images))), strict=True):
        assert_close(got[:, 0], want)


@pytest.mark.parametrize("kind", ["deit", "regnety"])
def test_directional_derivatives_by_two_pullbacks(kind):
    """The lines of docs/features.md, against differences of timm's outputs in float64."""
    oracle, ours, images = pair(kind)
    direction = np.random.default_rng(3).normal(size=images.shape).astype(np.float32)
    out, pullback = jax.vjp(ours.features, images)
    _, transpose = jax.vjp(lambda cotangent: pullback(cotangent)[0], jnp.zeros_like(out))
    (got,) = transpose(direction)

    def features(step):
        x = torch.from_numpy((images + step * direction.astype(np.float64)).transpose(0, 3, 1, 2))
        return oracle.forward_head(oracle.forward_features(x), pre_logits=True)

    oracle.double()
    with torch.no_grad():
        want = (features(1e-5) - features(-1e-5)) / 2e-5
    oracle.float()
    assert_close(got, want, 1e-4)


@pytest.mark.parametrize("kind", ["deit", "distilled", "resmlp", "regnety"])
def test_classifiers_are_replaced_and_left_out(kind, tmp_path):
    _, ours, images = pair(kind)
    graph, state = nnx.split(ours)
    ours, want = nnx.merge(graph, state), ours.features(images)
    body = trees.flat(nnx.to_pure_dict(nnx.state(ours)))
    ours.info = registry.model_info(
        KINDS[kind],
        num_classes=7,
        image_size=ours.info.image_size,
        overrides=ours.info.overrides,
        class_names=list("abcdefg"),
    )
    ours.reset_classifier(2, class_names=["cat", "dog"], rngs=nnx.Rngs(5))
    assert [head.shape for head in ours.heads(images)] == [(3, 2)] * len(ours.heads(images))
    assert ours.info.class_names == ("cat", "dog")
    drawn = ours.head.fc if kind == "regnety" else ours.head
    assert np.std(drawn.kernel[...]) == pytest.approx(0.01 if kind == "regnety" else 0.02, rel=0.3)
    for name, leaf in trees.flat(nnx.to_pure_dict(nnx.state(ours))).items():
        if not name.startswith("head"):
            np.testing.assert_array_equal(leaf, body[name], err_msg=name)
    save_model(tmp_path / "two", ours)
    np.testing.assert_array_equal(load_model(tmp_path / "two")(images), ours(images))

    ours.reset_classifier(0)
    assert_close(ours(images), want, 1e-6)
    save_model(tmp_path / "none", ours)
    again = load_model(tmp_path / "none")
    np.testing.assert_array_equal(again(images), ours(images))
    assert again.info.num_classes == 0
    again.reset_classifier(5)
    assert again(images).shape == (3, 5)


REFUSED = {
    "block": (
        "deit",
        lambda m, x: m.intermediates(x, [0, 3]),
        "but of 3 blocks .* 0 to 2",
    ),
    "none": ("deit", lambda m, x: m.intermediates(x, []), r"layers is \[\]"),
    "too many": ("deit", lambda m, x: m.attention_weights(x, 4), "layers is 4, but of 3 blocks"),
    "map": ("regnety", lambda m, x: m.intermediates(x, [5]), "but of 5 maps"),
    "no attention": ("resmlp", lambda m, x: m.attention_weights(x), "a ResMlp has no attention"),
    "nor here": ("regnety", lambda m, x: m.attention_weights(x), "a RegNetY has no attention"),
    "no rollout": (
        "resmlp",
        lambda m, x: m.attention_rollout(x),
        "has no attention whose weights",
    ),
    "classes": ("deit", lambda m, x: m.reset_classifier(-1), "num_classes is -1"),
    "names": ("deit", lambda m, x: m.reset_classifier(2, class_names=["a"]), "1 class names for 2"),
    "other size": ("resmlp", lambda m, x: m.features(x[:, :12]), "expected .batch, 16, 16, 3"),
    "part of a patch": (
        "dynamic",
        lambda m, x: m(x[:, :14]),
        "14×16, expected .* of the 4",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_one_line_says_what_cannot_be(case):
    kind, call, message = REFUSED[case]
    if kind == "dynamic":
        model = registry.create_model("deit_testing", image_size=16, dynamic_image_size=True)
        images = np.zeros((1, 16, 16, 3), np.float32)
    else:
        _, model, images = pair(kind)
    with pytest.raises(InputError, match=message) as caught:
        call(model, images)
    assert "\n" not in str(caught.value)
