"""What create_model makes and save_model takes, load_model gives back; else it is refused before.

One row for each argument and type that a user may pass.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deit_jax import trees
from deit_jax.checkpoints.model_folder import load_model, save_model
from deit_jax.convert import to_torch
from deit_jax.inference.preprocess import preprocess
from deit_jax.models import registry
from deit_jax.models.network import split_model
from deit_jax.models.registry import create_model
from tests.refusal import refusal

VIT = {"num_classes": 3, "image_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1}
REGNET = {"num_classes": 3, "image_size": 32, "depth": 2, "w0": 8, "group_width": 8}

OPTIONS = [
    ("deit_testing", {"num_classes": np.int64(3), "image_size": np.int32(24)}),
    ("deit_testing", {"num_classes": jnp.int32(1), "image_size": np.array(16)}),
    (
        "deit_testing",
        {"patch_size": np.uint8(8), "embed_dim": np.int64(8), "num_heads": np.int8(1)},
    ),
    ("deit_testing", {"depth": np.int16(2), "mlp_ratio": np.float32(1.3)}),
    ("deit_testing", {"num_classes": 0, "distilled": True}),
    ("deit_testing", {"image_size": 19}),  # not a multiple of the patch
    ("deit_testing", {"image_size": (16, np.int64(24))}),
    ("deit3_testing", {"image_size": [32, 32]}),
    ("regnety_testing", {"image_size": np.array([32, 64])}),
    ("deit_testing", {"mlp_ratio": 2, "distilled": np.bool_(True), "no_embed_class": np.True_}),
    ("deit_testing", {"layer_scale_init": np.float32(0.1)}),
    ("deit_testing", {"layer_scale_init": 0, "distilled": True}),
    ("deit3_testing", {"layer_scale_init": None, "no_embed_class": False}),
    ("deit3_testing", {"layer_scale_init": np.array(-1e-5)}),
    ("deit_testing_distilled", {"distilled": False}),
    ("deit_testing", {"drop_rate": np.float64(0.1), "drop_path_rate": np.float32(0.1)}),
    ("deit_testing", {"drop_path_mode": np.str_("constant"), "remat": np.bool_(True)}),
    *(("deit_testing", {"dtype": kind}) for kind in ("bfloat16", jnp.bfloat16, np.float32)),
    (np.str_("deit_testing"), {"dtype": jnp.dtype("bfloat16")}),
    ("regnety_testing", {"w0": np.int64(16), "wa": np.float32(0), "wm": 2}),
    ("regnety_testing", {"wa": 8, "wm": np.float32(1.5), "group_width": np.int32(16)}),
    ("regnety_testing", {"se_ratio": 1, "stem_width": np.int64(8), "depth": np.int64(1)}),
    ("regnety_testing", {"se_ratio": np.float16(0.3), "num_classes": 1, "dtype": "bfloat16"}),
]
FIELDS = [
    {"class_names": np.array(["a", "b", "c"])},
    {"class_names": ["Bär", "猫\n\x1b[31m", ""]},
    {"mean": np.array([0.1, 0.2, 0.3], np.float32), "std": [np.float32(0.5), 1, 2]},
    {"mean": (0, 0, 0), "std": jnp.ones(3)},
    {"crop_ratio": np.float32(0.9)},
    {"crop_ratio": 1},
    {"crop_ratio": None, "interpolation": np.str_("bilinear")},
    {"source": 'a "text"', "weights": "ema"},
    {"num_batches_tracked": np.array([3, 2**40])},
    {"image_size": np.int64(40), "name": np.str_("regnety_testing")},
]


def _created(name, options):
    small = REGNET if name == "regnety_testing" else VIT
    return create_model(name, **(small | options), rngs=nnx.Rngs(0))


def _assert_loads(folder, model, dtype):
    save_model(folder, model)
    loaded = load_model(folder, dtype=dtype)
    assert loaded.info == model.info
    assert json.dumps(dataclasses.asdict(loaded.info)) == json.dumps(dataclasses.asdict(model.info))
    found, expected = (trees.flat(split_model(each)[1]) for each in (loaded, model))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    size = np.broadcast_to(model.info.image_size, 2)
    images = jax.random.normal(jax.random.key(1), (1, *size, 3))
    np.testing.assert_array_equal(loaded(images), model(images))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_every_option(tmp_path, name, options):
    model = _created(name, options)
    _assert_loads(tmp_path / "model", model, options.get("dtype", "float32"))


@pytest.mark.parametrize(
    "fields", [FIELDS[0], *(pytest.param(row, marks=pytest.mark.slow) for row in FIELDS[1:])]
)
def test_every_field_of_the_description(tmp_path, fields):
    model = _created("regnety_testing", {})
    model.info = dataclasses.replace(model.info, **fields)
    _assert_loads(tmp_path / "model", model, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_another_type(tmp_path, dtype):
    model = _created("deit_testing", {})
    nnx.update(model, jax.tree.map(lambda x: x.astype(dtype), nnx.state(model, nnx.Param)))
    with jax.numpy_dtype_promotion("standard"):
        _assert_loads(tmp_path / "model", model, "float32")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        *(("deit_testing", {"num_classes": value}, "num_classes is") for value in (-1, 2.0, "3")),
        *(("deit_testing", {"num_classes": value}, "num_classes is") for value in (True, 2**30)),
        *(("deit_testing", {"image_size": x}, "image_size is") for x in ((16, 24, 3), [16], 16.0)),
        *(("deit_testing", {"image_size": x}, "image_size is") for x in (0, -1, 2**20, "16")),
        *(("deit_testing", {"depth": x}, "depth is") for x in (0, 1.0, True, "1", 1000, None)),
        *(("deit_testing", {"embed_dim": x}, "embed_dim is") for x in (0, 10_000, (8,))),
        *(("deit_testing", {"mlp_ratio": x}, "mlp_ratio") for x in (0, np.nan, "4", True, 0.01)),
        *(("deit_testing", {"patch_size": x}, "patch_size is") for x in ((8, 8), np.ones(2), 0)),
        *(("deit_testing", {"distilled": x}, "distilled is") for x in (1, "yes", None)),
        *(("deit_testing", {"layer_scale_init": x}, "layer_sc") for x in (np.inf, True, "0.1")),
        *(("deit_testing", {"drop_rate": x}, "drop_rate is") for x in (1.0, -0.1, "0.1", np.nan)),
        *(("deit_testing", {"drop_path_rate": x}, "drop_path") for x in ("0.1", True, [0.1])),
        *(("deit_testing", {"drop_path_mode": x}, "drop_path") for x in (None, ["linear"], 3)),
        *(("deit_testing", {"remat": x}, "remat is") for x in (1, "yes")),
        *(("deit_testing", {"dtype": x}, "dtype is") for x in ("float", np.float64, None, "x", 3)),
        *(("deit_testing", {"rngs": x}, "rngs is") for x in (0, nnx.Rngs(dropout=0))),
        *((name, {}, "unknown model") for name in (None, ["deit_testing"], 3)),
        *(("regnety_testing", {"w0": x}, "w0 is") for x in (24.5, 0, 1)),
        *(("regnety_testing", {"wm": x}, "wm is") for x in (1.0, 0.5, -2)),
        *(("regnety_testing", {"wa": x}, "wa is") for x in (-1, np.inf)),
        *(("regnety_testing", {"se_ratio": x}, "se_ratio") for x in (0, -1, 1e-3)),
    ],
)
def test_options_that_no_model_has_are_refused_at_creation(name, options, words):
    arguments = {"num_classes": 3, "image_size": 32, "rngs": nnx.Rngs(0)} | options
    assert words in refusal(lambda: create_model(name, **arguments))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"class_names": ("a", "b")}, "2 class names for 3"),
        ({"class_names": "abc"}, "class_names is"),
        ({"class_names": range(3)}, "class_names is"),
        ({"class_names": (1, 2, 3)}, "class_names is"),
        ({"class_names": ("a", "b", "\udcff as a file system may have it")}, "class_names is"),
        ({"class_names": np.array([b"a", b"b", b"c"])}, "class_names is"),
        ({"class_names": {"a", "b", "c"}}, "class_names is"),
        ({"mean": (0.5, 0.5)}, "mean is"),
        ({"mean": 0.5}, "mean is"),
        ({"mean": (0.5, np.nan, 0.5)}, "mean is"),
        ({"std": (1, 1, 0)}, "std is"),
        ({"crop_ratio": 0}, "crop_ratio is"),
        ({"crop_ratio": 1.1}, "crop_ratio is"),
        ({"image_size": (32, 0)}, "image_size is"),
        ({"num_classes": -1}, "num_classes is"),
        ({"source": b"bytes"}, "source is"),
        ({"interpolation": 3}, "interpolation is"),
        ({"overrides": {"depth": 3}}, "overrides is"),
        ({"overrides": [("dephts", 3)]}, "'dephts' is not a structural option"),
        ({"overrides": [("depth", 3.0)]}, "depth is"),
        ({"num_batches_tracked": (1.5,)}, "num_batches_tracked is"),
    ],
)
def test_fields_that_no_model_has_are_refused_at_once(fields, words):
    info = _created("regnety_testing", {}).info
    assert words in refusal(lambda: dataclasses.replace(info, **fields))


def test_weights_that_are_not_the_described_model_s_are_refused_at_saving(tmp_path):
    model = _created("deit_testing", {})
    described = model.info
    for fields in ({"num_classes": 4}, {"image_size": 32}, {"overrides": ()}):
        model.info = dataclasses.replace(described, **fields)
        line = refusal(save_model, tmp_path / "model", model)
        assert line.startswith("the weights to be saved do not match the model")
    model.info = None
    for wrong in (model, {"params": {}}, nnx.Linear(2, 2, rngs=nnx.Rngs(0))):
        assert "cannot be saved; build models by create_model" in refusal(
            save_model, tmp_path / "model", wrong
        )
    assert not (tmp_path / "model").exists()


def test_who_wants_square_images_says_so(tmp_path):
    model = _created("deit_testing", {"image_size": (16, 24)})
    save_model(tmp_path / "model", model)
    for action in (
        lambda: preprocess(model, np.zeros((40, 40, 3), np.uint8)),
        lambda: to_torch.write(tmp_path / "model", tmp_path / "hf", "hf"),
        lambda: registry.fixed_size(model.info),
    ):
        assert "images of deit_testing are (16, 24), height and width" in refusal(action)
