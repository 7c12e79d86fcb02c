"""Weights made to fit other models: what stays, what is new, and the logits of the reference."""

import dataclasses
import functools
import re
import unicodedata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from deit_jax import trees
from deit_jax.checkpoints.fit import fit as fit_weights
from deit_jax.checkpoints.fit import resize_pos_embed
from deit_jax.errors import InputError
from deit_jax.models import registry
from deit_jax.models.network import Variables, split_model
from tests.oracles import reference_vit, timm_models
from tests.oracles.reference_vit import ReferenceVit, interpolate
from tests.refusal import refusal

# The registry's testing models, for the torch module.
TESTING = {
    "image_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2,
    "num_classes": 5,
}  # fmt: skip
DEIT3 = {"no_embed_class": True, "layer_scale_init": 1e-4}


@functools.cache
def shapes(name, **options):
    """The computation of a model, and its Variables as shapes."""
    return split_model(registry.abstract_model(name, **({"num_classes": 5} | options)))


def filled(like, seed):
    """Variables with values that differ from leaf to leaf and seed to seed."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: 0.2 * rng.normal(size=leaf.shape).astype(np.float32), like)


def fit(source, target, *, fresh=True, other=(), new=(), **options):
    """Fits random weights, without an initialisation where `fresh` is False.

    Leaves in `new` have to be the fresh ones, all others but `other` the old ones: the very arrays.
    Returns (old, fresh, fitted) by leaf name, and the changes.
    """
    (network, like), (wanted, want) = source, target
    old, start = filled(like, 0), filled(want, 1)
    options["fresh"] = (lambda: start) if fresh else None
    got, changes = fit_weights(old, network.info, want, wanted.info, **options)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(lambda leaf: leaf.shape, want)
    assert key_order(got.params) == key_order(want.params)
    assert key_order(got.batch_stats) == key_order(want.batch_stats)
    assert all("\n" not in change for change in changes)
    old, start, got = (trees.flat(named(each)) for each in (old, start, got))
    for name, leaf in got.items():
        if name not in other:
            assert leaf is (start if name in new else old)[name], name
    return old, start, got, changes


def named(variables):
    return {**variables.params, "batch_stats": variables.batch_stats}


def key_order(tree):
    if not isinstance(tree, dict):
        return None
    return [(key, key_order(value)) for key, value in tree.items()]


def head(*names):
    return {f"{name}/{leaf}" for name in names for leaf in ("kernel", "bias")}


ALL = ["deit_testing", "deit_testing_distilled", "deit3_testing", "cait_testing"]
ALL += ["resmlp_testing", "regnety_testing"]


@pytest.mark.parametrize("name", ALL)
def test_the_number_of_classes(name):
    old, _, got, changes = fit(shapes(name), shapes(name), fresh=False)
    assert list(got) == list(old)
    assert changes == []
    heads = {
        "deit_testing_distilled": ("head", "head_dist"),
        "regnety_testing": ("head/fc",),
    }.get(name, ("head",))
    _, _, got, changes = fit(shapes(name), shapes(name, num_classes=7), new=head(*heads))
    assert changes == [
        f"{each.split('/')[0]} newly initialised: 7 classes, where {name} has 5" for each in heads
    ]
    assert any(leaf.startswith("batch_stats/") for leaf in got) == (name == "regnety_testing")


def with_names(model, *class_names):
    network, like = model
    info = dataclasses.replace(network.info, class_names=class_names)
    return dataclasses.replace(network, info=info), like


@pytest.mark.parametrize("name", ["deit_testing_distilled", "regnety_testing"])
def test_other_classes_of_the_same_number(name):
    model, heads = shapes(name), head("head", "head_dist", "head/fc")
    birds = with_names(model, "ara", "jay", "owl", "tit", "emu")
    fish = with_names(model, "ara", "jay", "cod", "tit", "emu")
    *_, changes = fit(birds, fish, new=heads)
    assert len(changes) == (2 if "distilled" in name else 1)
    assert all("'owl' is now 'cod'" in change for change in changes)
    # The same names, or none on one side: no reason to forget the heads.
    for target in (birds, model):
        assert fit(birds, target, fresh=False)[3] == []


def test_class_names_in_another_unicode_form_are_the_same():
    composed, decomposed = (
        with_names(shapes("deit_testing"), "ara", unicodedata.normalize(form, "mü"), *"jkl")
        for form in ("NFC", "NFD")
    )
    assert composed[0].info.class_names != decomposed[0].info.class_names
    assert fit(composed, decomposed, fresh=False)[3] == []


SIZES = [
    ("deit_testing", 32, 48, 1, (8, 8), (12, 12)),
    ("deit_testing_distilled", 32, 24, 2, (8, 8), (6, 6)),
    ("deit3_testing", 32, (40, 24), 0, (8, 8), (10, 6)),
    ("cait_testing", 32, 48, 0, (8, 8), (12, 12)),
    ("deit_testing", (24, 40), 32, 1, (6, 10), (8, 8)),
    ("deit_testing", 32, (35, 34), 1, (8, 8), (8, 8)),  # the last pixels are in no patch
]


@pytest.mark.parametrize("kernel", ["reference", "timm"])
@pytest.mark.parametrize(("name", "old_size", "size", "num_prefix", "old_grid", "grid"), SIZES)
def test_other_image_size(name, old_size, size, num_prefix, old_grid, grid, kernel):
    source, target = shapes(name, image_size=old_size), shapes(name, image_size=size)
    other = {"pos_embed"} if grid != old_grid else ()
    old, _, got, changes = fit(source, target, fresh=False, kernel=kernel, other=other)
    how = {"grid": grid, "num_prefix": num_prefix, "old_grid": old_grid, "kernel": kernel}
    np.testing.assert_array_equal(got["pos_embed"], resize_pos_embed(old["pos_embed"], **how))
    grids = f"{old_grid[0]}×{old_grid[1]} to {grid[0]}×{grid[1]}"
    assert changes == [f"pos_embed resized from {grids} patches, {kernel} kernel" for _ in other]


def test_the_distillation_token_is_dropped():
    distilled, plain = shapes("deit_testing_distilled"), shapes("deit_testing")
    old, _, got, changes = fit(distilled, plain, fresh=False, other={"pos_embed"})
    kept = [0, *range(2, 66)]
    np.testing.assert_array_equal(got["pos_embed"], old["pos_embed"][:, kept])
    assert changes == [
        "dist_token, head_dist, row 1 of pos_embed dropped: deit_testing is not distilled"
    ]


@pytest.mark.parametrize("target", [{}, {"num_classes": 7, "image_size": 48}])
def test_a_distillation_token_is_added(target):
    """Alone, and with everything else at once."""
    new = {"dist_token"} | head("head_dist", *(["head"] if target else []))
    wanted = shapes("deit_testing_distilled", **target)
    old, fresh, got, changes = fit(shapes("deit_testing"), wanted, new=new, other={"pos_embed"})
    want = old["pos_embed"]
    if target:
        want = resize_pos_embed(want, grid=(12, 12), num_prefix=1)
    np.testing.assert_array_equal(np.delete(got["pos_embed"], 1, axis=1), want)
    np.testing.assert_array_equal(got["pos_embed"][:, 1], fresh["pos_embed"][:, 1])
    names = ["dist_token", "head_dist", "row"]
    if target:
        names = ["pos_embed", "head", *names]
    assert [change.split(" ")[0] for change in changes] == names
    assert changes[-1] == "row 1 of pos_embed newly initialised: deit_testing is not distilled"


@pytest.mark.parametrize("name", ["deit_testing", "deit_testing_distilled", "regnety_testing"])
def test_heads_come_and_go(name):
    """From features to classes, and back."""
    heads = ["head", "head_dist"] if "distilled" in name else ["head"]
    without, with_heads = shapes(name, num_classes=0), shapes(name)
    names = head(*heads) if "regnety" not in name else head("head/fc")
    _, _, _, changes = fit(without, with_heads, new=names)
    why = f"newly initialised: 5 classes, where {name} has 0"
    assert changes == [f"{each} {why}" for each in heads]
    _, _, _, changes = fit(with_heads, without, fresh=False)
    assert changes == [f"{', '.join(heads)} dropped: {name} is to have no classes"]


def test_shapes_alone_tell_what_would_be_done():
    (network, like) = shapes("deit_testing")
    (wanted, want) = shapes("deit_testing_distilled", image_size=48)
    got, changes = fit_weights(like, network.info, want, wanted.info, fresh=lambda: want)
    trees.check_like(got.params, want.params)
    assert len(changes) == 4


DIFFERENT = [
    ("deit_testing", {}, "deit3_testing", {}, "of deit_testing, but .* for is deit3_testing"),
    ("deit3_testing", {}, "deit_testing", {}, "name=deit3_testing, or empty"),
    ("deit_testing", {}, "deit_testing", {"no_embed_class": True}, "no_embed_class"),
    ("deit_testing", {}, "deit_testing", {"embed_dim": 32}, r"expected \(32,\)"),
    ("deit_testing", {"depth": 5}, "deit_testing", {}, "unexpected .*blocks/4/"),
    ("deit_testing", {}, "deit_testing", {"patch_size": 8}, "patch_embed/proj/kernel"),
    ("regnety_testing", {}, "deit_testing_distilled", {}, "name=regnety_testing, or empty"),
    ("resmlp_testing", {}, "resmlp_testing", {"image_size": 48}, "of 32×32 pixels, and no others"),
    ("deit_testing", {}, "deit_testing", {"num_heads": 4}, "2 attention heads.* 4;"),
    ("vit_testing_rope", {}, "vit_testing_rope", {"rope": "none"}, 'rope "axial".*rope "none"'),
]


@pytest.mark.parametrize(("name", "options", "target", "target_options", "message"), DIFFERENT)
def test_other_bodies_are_refused(name, options, target, target_options, message):
    line = refusal(fit, shapes(name, **options), shapes(target, **target_options))
    assert re.search(message, line)
    assert f"weights of {name}" in line
    assert target in line.replace(f"weights of {name}", "", 1)


def test_heads_given_by_the_registry_or_by_hand_are_the_same():
    fit(shapes("deit_testing"), shapes("deit_testing", num_heads=2), fresh=False)


def test_new_leaves_need_an_initialisation_of_the_target():
    target = shapes("deit_testing_distilled", num_classes=7)
    line = refusal(lambda: fit(shapes("deit_testing"), target, fresh=False))
    for name in ("head (7 classes", "dist_token", "head_dist", "row 1 of pos_embed"):
        assert name in line
    network, like = shapes("deit_testing")
    wanted, want = shapes("deit_testing", num_classes=7)
    old = filled(like, 0)
    with pytest.raises(InputError, match=r"fresh parameters of deit_testing.*head/kernel"):
        fit_weights(old, network.info, want, wanted.info, fresh=lambda: old)


def test_a_wrong_image_size_is_refused():
    network, like = shapes("deit_testing")
    wrong = dataclasses.replace(network.info, image_size=48)
    with pytest.raises(InputError, match="65 rows, but 48×48 pixels are 12×12 patches"):
        fit_weights(filled(like, 0), wrong, like, network.info)


# The torch module, against timm, and as the judge of fitted weights.


def reference(seed=0, **options):
    return timm_models.randomise(ReferenceVit(**(TESTING | options)), seed)


def to_variables(tensors):
    """The torch module's tensors as our Variables."""
    named = {reference_vit.timm_name(name): tensor for name, tensor in tensors.items()}
    return Variables(timm_models.to_tree(named), {})


def images(*size):
    rng = np.random.default_rng(3)
    return torch.from_numpy(rng.normal(size=(2, 3, *size)).astype(np.float32))


def assert_close(got, want, tolerance):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


@pytest.mark.parametrize(
    "options",
    [{}, {"distilled": True}, DEIT3, {"image_size": (19, 14), "distilled": True}],
    ids=["plain", "distilled", "deit3", "odd"],
)
def test_reference_module_equals_timm(options):
    ours = reference(**options)
    theirs = timm_models.vit(seed=1, **(TESTING | options))
    state = {reference_vit.timm_name(name): tensor for name, tensor in ours.state_dict().items()}
    assert set(state) == set(theirs.state_dict())
    theirs.load_state_dict(state)
    pixels = images(*options.get("image_size", (32, 32)))
    with torch.no_grad():
        assert_close(ours.forward_features(pixels), theirs.forward_features(pixels), 1e-5)
        assert_close(ours(pixels), theirs(pixels), 1e-5)
        if "distilled" in options:
            theirs.set_distilled_training(True)
            for got, want in zip(ours.heads(pixels), theirs.train()(pixels), strict=True):
                assert_close(got, want, 1e-5)


@pytest.mark.parametrize(
    ("name", "options", "had", "target", "changes", "has", "size"),
    [
        ("deit_testing_distilled", {"distilled": True}, 2, "deit_testing", {}, 1, (48, 40)),
        ("deit3_testing", DEIT3, 0, "deit3_testing", {"num_classes": 7} | DEIT3, 0, (24, 24)),
        ("deit_testing", {}, 1, "deit_testing_distilled", {"distilled": True}, 2, (32, 32)),
    ],
)
def test_fitted_weights_give_the_logits_of_the_reference(
    name, options, had, target, changes, has, size
):
    """Of a torch module that is filled as the reference fills it: rows resized, heads its own."""
    source, module = reference(**options).state_dict(), reference(1, image_size=size, **changes)
    own = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    prefix, patches = source["pos_embed"].split([had, 64], dim=1)
    prefix = torch.cat([prefix, own["pos_embed"][:, had:has]], dim=1)[:, :has]
    grid = size[0] // 4, size[1] // 4
    field = interpolate(patches.reshape(8, 8, 64), grid, antialias=False).reshape(1, -1, 64)
    fitting = {k: v for k, v in source.items() if k in own and v.shape == own[k].shape}
    module.load_state_dict(own | fitting | {"pos_embed": torch.cat([prefix, field], dim=1)})

    classes = changes.get("num_classes", 5)
    network, want = shapes(target, image_size=size, num_classes=classes)
    info, fresh = shapes(name)[0].info, to_variables(own)
    fitted, _ = fit_weights(to_variables(source), info, want, network.info, fresh=lambda: fresh)
    pixels = images(*size)
    got, _ = jax.jit(network)(jax.tree.map(jnp.asarray, fitted), pixels.permute(0, 2, 3, 1).numpy())
    for ours, theirs in zip(got, module.heads(pixels), strict=True):
        assert_close(ours, theirs, 2e-5)
