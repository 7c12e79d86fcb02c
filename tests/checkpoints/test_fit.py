"""Weights made to fit other models, against the resizes of PyTorch, timm and the reference."""

import dataclasses
import functools

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

from timm.layers import resample_abs_pos_embed  # isort: skip  # after torchvision's preparation

# The registry's testing models, for the torch module.
TESTING = {"image_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2}
DEIT3 = {"no_embed_class": True, "layer_scale_init": 1e-4}
GRIDS = [
    ((14, 14), (24, 24)),
    ((24, 24), (14, 14)),
    ((14, 14), (12, 12)),
    ((16, 16), (11, 11)),
    ((14, 10), (12, 20)),
    ((12, 20), (14, 10)),
    ((7, 9), (9, 7)),
    # Not one column: there torch's antialiased resize contradicts its own channels-last result.
    ((3, 8), (8, 2)),
]


def embeddings(rows, *, width=16, seed=0):
    """[1, rows, width] of the size of trained ones: channels of std 0.02 to 0.14."""
    rng = np.random.default_rng(seed)
    stds = np.geomspace(0.02, 0.14, width)
    return (rng.normal(size=(1, rows, width)) * stds).astype(np.float32)


@pytest.mark.parametrize("kernel", ["reference", "timm"])
@pytest.mark.parametrize(("old_grid", "grid"), GRIDS)
def test_resize_equals_torch(kernel, old_grid, grid):
    pos = embeddings(2 + old_grid[0] * old_grid[1])
    got = resize_pos_embed(pos, grid=grid, num_prefix=2, old_grid=old_grid, kernel=kernel)
    assert got.dtype == np.float32
    assert got.shape == (1, 2 + grid[0] * grid[1], 16)
    np.testing.assert_array_equal(got[:, :2], pos[:, :2])
    field = torch.from_numpy(pos[0, 2:].reshape(*old_grid, 16))
    # torch rounds positions and weights to float32, and so adds noise of its own.
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 1e-6)):
        want = interpolate(field.to(dtype), grid, antialias=kernel == "timm").numpy()
        np.testing.assert_allclose(got[0, 2:].reshape(want.shape), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("num_prefix", [0, 1, 2])
@pytest.mark.parametrize(("old_grid", "grid"), [GRIDS[0], GRIDS[1], GRIDS[4]])
def test_timm_kernel_equals_timm(num_prefix, old_grid, grid):
    pos = embeddings(num_prefix + old_grid[0] * old_grid[1])
    given = None if old_grid[0] == old_grid[1] else old_grid  # None: square
    got = resize_pos_embed(pos, grid=grid, num_prefix=num_prefix, old_grid=given, kernel="timm")
    want = resample_abs_pos_embed(
        torch.from_numpy(pos), grid, old_grid, num_prefix_tokens=num_prefix
    )
    np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=1e-6)


def test_kernels_on_a_known_field():
    """Rows computed with PyTorch 4×4 → 6×6 when the recipes were collected."""
    pos = np.sin(np.arange(16.0)).reshape(1, 16, 1).astype(np.float32)
    want = {
        "reference": [-0.015213, 0.530344, 1.096683, 1.106079, 0.555793, 0.016814],
        "timm": [-0.010087, 0.476463, 1.026097, 1.045660, 0.523073, 0.049266],
    }
    for kernel, row in want.items():
        got = resize_pos_embed(pos, grid=(6, 6), num_prefix=0, kernel=kernel)
        np.testing.assert_allclose(got[0, :6, 0], row, atol=1e-6)


def test_the_same_grid_keeps_the_bits():
    pos = embeddings(2 + 70)
    for kernel in ("reference", "timm"):
        got = resize_pos_embed(pos, grid=(7, 10), num_prefix=2, old_grid=(7, 10), kernel=kernel)
        assert got.tobytes() == pos.tobytes()


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (1 + 15, {"num_prefix": 1}, "15 position .*old_grid"),
        (1 + 16, {"num_prefix": 1, "old_grid": (3, 5)}, "from 3×5 to 6×6"),
        (1 + 16, {"num_prefix": 1, "grid": (0, 6)}, "to 0×6"),
        (1 + 16, {"num_prefix": 1, "kernel": "nearest"}, "nearest"),
        (2, {"num_prefix": 2}, r"shape \(1, 2, 16\), expected"),
    ],
)
def test_resize_explains_bad_input(rows, options, message):
    with pytest.raises(InputError, match=message) as error:
        resize_pos_embed(embeddings(rows), **({"grid": (6, 6)} | options))
    assert "\n" not in str(error.value)


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


ALL = ["deit_testing", "deit_testing_distilled", "deit3_testing", "regnety_testing"]


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


SIZES = [
    ("deit_testing", 48, 1, (12, 12)),
    ("deit_testing_distilled", 24, 2, (6, 6)),
    ("deit3_testing", (40, 24), 0, (10, 6)),
    ("deit_testing", (35, 34), 1, (8, 8)),  # the last pixels are in no patch
]


def assert_resized(got, pos, old_grid, grid, num_prefix, kernel="reference"):
    """Compares position embeddings with PyTorch's own resize of `pos`."""
    np.testing.assert_array_equal(got[:, :num_prefix], pos[:, :num_prefix])
    field = torch.from_numpy(pos[0, num_prefix:].reshape(*old_grid, -1)).double()
    want = interpolate(field, grid, antialias=kernel == "timm").numpy().reshape(1, -1, 64)
    np.testing.assert_allclose(got[:, num_prefix:], want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kernel", ["reference", "timm"])
@pytest.mark.parametrize(("name", "size", "num_prefix", "grid"), SIZES)
def test_other_image_size(name, size, num_prefix, grid, kernel):
    target, same = shapes(name, image_size=size), grid == (8, 8)
    other = () if same else {"pos_embed"}
    old, _, got, changes = fit(shapes(name), target, fresh=False, kernel=kernel, other=other)
    if same:
        assert changes == []
        return
    assert_resized(got["pos_embed"], old["pos_embed"], (8, 8), grid, num_prefix, kernel)
    assert changes == [
        f"pos_embed resized from 8×8 to {grid[0]}×{grid[1]} patches, {kernel} kernel"
    ]


def test_back_from_images_that_are_not_square():
    source = shapes("deit_testing", image_size=(24, 40))
    old, _, got, _ = fit(source, shapes("deit_testing"), other={"pos_embed"})
    assert_resized(got["pos_embed"], old["pos_embed"], (6, 10), (8, 8), 1)


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


def test_without_class_positions_a_distillation_token_changes_no_position():
    plain = shapes("deit3_testing")
    distilled = shapes("deit3_testing", distilled=True)
    *_, changes = fit(plain, distilled, new={"dist_token"} | head("head_dist"))
    assert len(changes) == 2
    *_, changes = fit(distilled, plain)
    assert changes == ["dist_token, head_dist dropped: deit3_testing is not distilled"]


def test_jax_arrays_and_another_key_order():
    network, like = shapes("deit3_testing")
    wanted, want = shapes("deit3_testing", image_size=24)

    def backwards(tree):
        if not isinstance(tree, dict):
            return jnp.asarray(tree)
        return {key: backwards(tree[key]) for key in reversed(tree)}

    numpy = filled(like, 0)
    got, _ = fit_weights(Variables(backwards(numpy.params), {}), network.info, want, wanted.info)
    assert key_order(got.params) == key_order(want.params)
    expected, _ = fit_weights(numpy, network.info, want, wanted.info)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_shapes_alone_tell_what_would_be_done():
    (network, like) = shapes("deit_testing")
    (wanted, want) = shapes("deit_testing_distilled", image_size=48)
    got, changes = fit_weights(like, network.info, want, wanted.info, fresh=lambda: want)
    trees.check_like(got.params, want.params)
    assert len(changes) == 4


DIFFERENT = [
    ("deit_testing", {}, "deit3_testing", {}, "missing .*ls1/gamma"),
    ("deit3_testing", {}, "deit_testing", {}, "unexpected .*ls1/gamma"),
    ("deit_testing", {}, "deit_testing", {"no_embed_class": True}, "no_embed_class"),
    ("deit_testing", {}, "deit_testing", {"embed_dim": 32}, r"expected \(32,\)"),
    ("deit_testing", {"depth": 5}, "deit_testing", {}, "unexpected .*blocks/4/"),
    ("deit_testing", {}, "deit_testing", {"patch_size": 8}, "patch_embed/proj/kernel"),
    ("regnety_testing", {}, "deit_testing_distilled", {}, "missing .*blocks/0/"),
    ("deit_testing", {}, "deit_testing", {"num_heads": 4}, "2 attention heads.* 4;"),
]


@pytest.mark.parametrize(("name", "options", "target", "target_options", "message"), DIFFERENT)
def test_other_bodies_are_refused(name, options, target, target_options, message):
    with pytest.raises(InputError, match=message) as error:
        fit(shapes(name, **options), shapes(target, **target_options))
    assert "\n" not in str(error.value)
    assert f"weights of {name}" in str(error.value)
    assert target in str(error.value).replace(f"weights of {name}", "", 1)


def test_heads_given_by_the_registry_or_by_hand_are_the_same():
    fit(shapes("deit_testing"), shapes("deit_testing", num_heads=2), fresh=False)


def test_new_leaves_need_an_initialisation_of_the_target():
    target = shapes("deit_testing_distilled", num_classes=7)
    with pytest.raises(InputError) as error:
        fit(shapes("deit_testing"), target, fresh=False)
    message = str(error.value)
    assert "\n" not in message
    for name in ("head (7 classes", "dist_token", "head_dist", "row 1 of pos_embed"):
        assert name in message
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
    return timm_models.randomise(ReferenceVit(**(TESTING | {"num_classes": 5} | options)), seed)


def to_variables(tensors):
    """The torch module's tensors as our Variables."""
    return Variables(
        timm_models.to_tree({reference_vit.timm_name(k): v for k, v in tensors.items()}), {}
    )


def images(*size):
    return np.random.default_rng(3).normal(size=(2, *size, 3)).astype(np.float32)


def to_torch(pixels):
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


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
    theirs = timm_models.vit(seed=1, **(TESTING | {"num_classes": 5} | options))
    state = {reference_vit.timm_name(name): tensor for name, tensor in ours.state_dict().items()}
    assert set(state) == set(theirs.state_dict())
    theirs.load_state_dict(state)
    size = options.get("image_size", (32, 32))
    pixels = to_torch(images(*size))
    with torch.no_grad():
        assert_close(ours.forward_features(pixels), theirs.forward_features(pixels), 1e-5)
        assert_close(ours(pixels), theirs(pixels), 1e-5)
        if "distilled" in options:
            theirs.set_distilled_training(True)
            for got, want in zip(ours.heads(pixels), theirs.train()(pixels), strict=True):
                assert_close(got, want, 1e-5)


def resized(state, grid, num_prefix):
    """What the reference does to a checkpoint before it fine-tunes at another size."""
    prefix, patches = state["pos_embed"][0].split([num_prefix, 64])
    patches = interpolate(patches.reshape(8, 8, -1), grid, antialias=False).flatten(0, 1)
    return state | {"pos_embed": torch.cat([prefix, patches])[None]}


def fitted_heads(tensors, name, target_name, pixels, fresh=None, **options):
    """Our logits after fitting the tensors to a target of this size."""
    network, want = shapes(target_name, image_size=tuple(pixels.shape[1:3]), **options)
    variables, _ = fit_weights(
        to_variables(tensors), shapes(name)[0].info, want, network.info, fresh=fresh
    )
    variables = jax.tree.map(jnp.asarray, variables)
    return jax.jit(lambda variables: network(variables, pixels)[0])(variables)


def test_a_plain_model_from_a_distilled_one_at_another_size():
    distilled = reference(distilled=True).state_dict()
    pixels = images(48, 40)
    plain = reference(seed=1, image_size=(48, 40))
    state = resized(distilled, (12, 10), 2)
    state["pos_embed"] = state["pos_embed"][:, [0, *range(2, 122)]]
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    (got,) = fitted_heads(distilled, "deit_testing_distilled", "deit_testing", pixels)
    assert_close(got, plain(to_torch(pixels)), 2e-5)


def test_a_deit3_at_another_size_with_other_classes():
    source = reference(**DEIT3).state_dict()
    pixels = images(24, 24)
    target = reference(seed=1, image_size=24, num_classes=7, **DEIT3)
    fresh = to_variables({k: v.clone() for k, v in target.state_dict().items()})
    heads = {k: v for k, v in target.state_dict().items() if k.startswith("head")}
    target.load_state_dict(resized(source, (6, 6), 0) | heads)
    (got,) = fitted_heads(
        source, "deit3_testing", "deit3_testing", pixels, fresh=lambda: fresh, num_classes=7
    )
    assert_close(got, target(to_torch(pixels)), 2e-5)


def test_a_distilled_model_from_a_plain_one():
    plain = reference().state_dict()
    pixels = images(32, 32)
    target = reference(seed=1, distilled=True)
    own = {k: v.clone() for k, v in target.state_dict().items()}
    pos, new = plain["pos_embed"], own["pos_embed"]
    target.load_state_dict(
        own | plain | {"pos_embed": torch.cat([pos[:, :1], new[:, 1:2], pos[:, 1:]], dim=1)}
    )
    got = fitted_heads(
        plain, "deit_testing", "deit_testing_distilled", pixels, fresh=lambda: to_variables(own)
    )
    for ours, theirs in zip(got, target.heads(to_torch(pixels)), strict=True):
        assert_close(ours, theirs, 2e-5)
