import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from deit_jax import trees
from deit_jax.errors import InputError
from deit_jax.models.registry import (
    ModelInfo,
    abstract_model,
    create_model,
    is_distilled,
    list_models,
    model_info,
    names_of,
)

# Published sizes: (trained parameters, trained tensors).
VITS = {
    "deit_tiny_patch16_224": (5_717_416, 152),
    "deit_small_patch16_224": (22_050_664, 152),
    "deit_base_patch16_224": (86_567_656, 152),
    "deit_base_patch16_384": (86_859_496, 152),
    "deit_tiny_distilled_patch16_224": (5_910_800, 155),
    "deit_small_distilled_patch16_224": (22_436_432, 155),
    "deit_base_distilled_patch16_224": (87_338_192, 155),
    "deit_base_distilled_patch16_384": (87_630_032, 155),
    "deit3_tiny_patch16_224": (5_721_832, 176),
    "deit3_small_patch16_224": (22_059_496, 176),
    "deit3_small_patch16_384": (22_205_416, 176),
    "deit3_medium_patch16_224": (38_849_512, 176),
    "deit3_base_patch16_224": (86_585_320, 176),
    "deit3_base_patch16_384": (86_877_160, 176),
    "deit3_large_patch16_224": (304_374_760, 344),
    "deit3_large_patch16_384": (304_763_880, 344),
    "deit3_huge_patch14_224": (632_126_440, 456),
    "deit3_small_patch16_36x1_224": (64_665_064, 512),
    "deit3_small_patch16_18x2_224": (64_665_064, 512),
    "deit3_base_patch16_36x1_224": (256_731_112, 512),
    "deit3_base_patch16_18x2_224": (256_731_112, 512),
    "deit3_small_hmlp_224": (21_954_856, 186),
    "deit3_base_hmlp_224": (86_744_680, 186),
    "vit_small_patch16_36x1_224": (64_665_448, 512),
    "vit_small_patch16_18x2_224": (64_665_448, 512),
    "vit_base_patch16_18x2_224": (256_731_880, 512),
    "cait_xxs24_224": (11_956_264, 476),
    "cait_xxs24_384": (12_029_224, 476),
    "cait_xxs36_224": (17_299_720, 692),
    "cait_xxs36_384": (17_372_680, 692),
    "cait_xs24_384": (26_670_088, 476),
    "cait_s24_224": (46_916_200, 476),
    "cait_s24_384": (47_062_120, 476),
    "cait_s36_384": (68_366_632, 692),
    "cait_m36_384": (271_221_352, 692),
    "cait_m48_448": (356_460_520, 908),
    "resmlp_12_224": (15_350_872, 150),
    "resmlp_24_224": (30_020_680, 294),
    "resmlp_36_224": (44_690_488, 438),
    "resmlp_big_24_224": (129_138_280, 294),
}
# RoPE-ViT: less the position embeddings; mixed with two frequencies for each pair of channels.
for size, dim, depth in (("small", 384, 12), ("base", 768, 12), ("large", 1024, 24)):
    deit3, tensors = VITS[f"deit3_{size}_patch16_224"]
    for kind, freqs in (("", 0), ("_mixed", depth * dim)):
        ape = deit3 + freqs, tensors + bool(freqs)
        VITS[f"vit_{size}_patch16_rope{kind}_ape_224"] = ape
        VITS[f"vit_{size}_patch16_rope{kind}_224"] = ape[0] - 196 * dim, ape[1] - 1
VITS |= {  # the last only defined, without published weights
    "vit5_small_patch16_224": (22_039_144, 164),
    "vit5_base_patch16_224": (86_543_080, 164),
    "vit5_base_patch16_384": (86_834_920, 164),
    "vit5_large_patch16_224": (304_258_024, 320),
    "vit5_large_patch16_384": (304_647_144, 320),
    "vit5_xlarge_patch16_224": (448_505_128, 372),
}
REGNETS = {
    "regnety_002": 3_162_996,
    "regnety_004": 4_344_144,
    "regnety_006": 6_055_160,
    "regnety_008": 6_263_168,
    "regnety_016": 11_202_430,
    "regnety_032": 19_436_338,
    "regnety_040": 20_646_656,
    "regnety_064": 30_583_252,
    "regnety_080": 39_180_068,
    "regnety_120": 51_822_544,
    "regnety_160": 83_590_140,
    "regnety_320": 145_046_770,
}
TESTING = [
    *("cait_testing", "deit3_testing", "deit_testing", "deit_testing_distilled", "hmlp_testing"),
    *("parallel_testing", "regnety_testing", "resmlp_testing"),
    *("vit5_testing", "vit_testing_rope", "vit_testing_rope_mixed_ape"),
]


def split(model):
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(stats)


def test_names():
    assert list_models() == sorted([*VITS, *REGNETS])
    assert names_of() == sorted([*VITS, *REGNETS, *TESTING])
    assert list_models("deit3*") == [name for name in sorted(VITS) if name.startswith("deit3")]
    assert list_models("*testing*") == TESTING
    assert list_models("nothing*") == []
    assert [name for name in list_models() if is_distilled(name)] == list_models("*distilled*")


@pytest.mark.parametrize("name", [*VITS, *REGNETS])
def test_published_sizes(name):
    _, params, stats = split(abstract_model(name))
    tensors, norms = len(trees.leaf_names(params)), len(trees.leaf_names(stats)) // 2
    size = trees.param_count(params)
    if name in VITS:
        assert (size, tensors, norms) == (*VITS[name], 3 * ("hmlp" in name))
    else:
        assert size == REGNETS[name]
    if name == "regnety_160":  # a PyTorch file has 428: with one step counter for each batch norm
        assert tensors + 3 * norms == 428


def test_parameter_names_are_the_contract():
    _, params, _ = split(abstract_model("deit3_testing", depth=1))
    block = [
        *("attn/proj/bias", "attn/proj/kernel", "attn/qkv/bias", "attn/qkv/kernel"),
        *("ls1/gamma", "ls2/gamma"),
        *("mlp/fc1/bias", "mlp/fc1/kernel", "mlp/fc2/bias", "mlp/fc2/kernel"),
        *("norm1/bias", "norm1/scale", "norm2/bias", "norm2/scale"),
    ]
    outside = ["cls_token", "head/bias", "head/kernel", "norm/bias", "norm/scale"]
    outside += ["patch_embed/proj/bias", "patch_embed/proj/kernel", "pos_embed"]
    assert trees.leaf_names(params) == [f"blocks/0/{name}" for name in block] + outside
    shapes = {name: leaf.shape for name, leaf in trees.flat(params).items()}
    assert shapes["patch_embed/proj/kernel"] == (4, 4, 3, 64)
    assert shapes["cls_token"] == (1, 1, 64)
    assert shapes["pos_embed"] == (1, 64, 64)
    assert shapes["blocks/0/attn/qkv/kernel"] == (64, 192)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit_testing_distilled", {"depth": 1}),
        ("cait_testing", {"depth": 1}),
        ("resmlp_testing", {"depth": 1}),
        ("vit_testing_rope_mixed_ape", {"depth": 1}),
        ("vit5_testing", {"depth": 1}),
        ("regnety_testing", {"depth": 2, "wa": 0.0}),
    ],
)
def test_graphs_are_static_and_hold_nothing_but_weights(name, options):
    def create(rngs):
        return create_model(name, num_classes=5, rngs=rngs, **options)

    first, second = create(nnx.Rngs(0)), create(nnx.Rngs(params=jax.random.key(1)))
    abstract = abstract_model(name, num_classes=5, **options)
    graphdef, params, _ = split(first)
    assert graphdef == nnx.graphdef(second) == nnx.graphdef(abstract)
    assert hash(graphdef) == hash(nnx.graphdef(second))
    trees.check_like(params, split(abstract)[1])
    for leaf_name, leaf in trees.flat(split(second)[1]).items():
        drawn = leaf_name.endswith(("kernel", "token", "pos_embed", "freqs"))
        assert np.array_equal(leaf, trees.flat(params)[leaf_name]) != drawn or "/proj/" in leaf_name
    assert nnx.merge(*nnx.split(first)).info == first.info == abstract.info


def test_info_describes_the_model():
    options = {"num_classes": 3, "image_size": 16, "patch_size": 8}
    info = abstract_model("deit_testing", remat=True, **options).info
    assert (info.name, info.num_classes, info.image_size) == ("deit_testing", 3, 16)
    # What only concerns training is not part of the description.
    assert info.overrides == (("patch_size", 8),)
    size = {"num_classes": info.num_classes, "image_size": info.image_size}
    rebuilt = abstract_model(info.name, **size, **dict(info.overrides))
    assert rebuilt.info == info
    assert rebuilt.pos_embed.shape == (1, 5, 64)


def test_info_defaults_and_json():
    for name, size, crop_ratio in (
        ("deit_base_patch16_384", 384, 0.875),
        ("deit3_base_patch16_224", 224, 1.0),
        ("cait_m48_448", 448, 1.0),
        ("resmlp_36_224", 224, 0.9),
        ("vit_base_patch16_rope_mixed_224", 224, 1.0),
        ("vit5_base_patch16_384", 384, 1.0),
        ("regnety_160", 224, 0.875),
        ("deit_testing", 32, None),
    ):
        info = model_info(name)
        assert (info.image_size, info.crop_ratio) == (size, crop_ratio)
    options = {"num_classes": 2, "class_names": ("a", "b"), "overrides": (("depth", 2),)}
    info = model_info("deit_testing", **options)
    restored = ModelInfo(**json.loads(json.dumps(dataclasses.asdict(info))))
    assert restored == info
    assert hash(restored) == hash(info)


def test_deit3_and_deit_drop_paths_differ():
    deit3 = abstract_model("deit3_testing", drop_path_rate=0.3)
    deit = abstract_model("deit_testing", drop_path_rate=0.3)
    assert [block.drop_path.rate for block in deit3.blocks] == [0.3] * 4
    np.testing.assert_allclose([b.drop_path.rate for b in deit.blocks], [0.0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("deit_tiny_patch16", {}, 'unknown model "deit_tiny_patch16": did you mean deit_tiny_'),
        ("deit_testing", {"depht": 2}, 'no option "depht": did you mean depth'),
        ("deit_testing", {"img_size": 64}, 'no option "img_size": did you mean image_size'),
        ("nothing_like_it", {}, 'unknown model "nothing_like_it"; expected one of cait'),
        ("deit_testing", {"w0": 2}, 'model deit_testing has no option "w0"'),
        ("regnety_testing", {"remat": True}, 'model regnety_testing has no option "remat"'),
        ("regnety_testing", {"drop_path_rate": 0.1}, "has no stochastic depth"),
        ("cait_testing", {"drop_path_mode": "linear"}, 'no option "drop_path_mode"'),
        ("cait_testing", {"attention": "pallas", "dtype": "bfloat16"}, "in one way; set"),
        ("cait_testing", {"attention": "cudnn"}, 'attention is "cudnn", but talking heads'),
        ("cait_testing", {"attention": "xla_remat"}, 'attention is "xla_remat", but talking heads'),
        ("cait_testing", {"layer_scale_init": None}, "layer_scale_init is None"),
        ("resmlp_testing", {"layer_scale_init": None}, "layer_scale_init is None"),
        ("deit_testing", {"num_classes": -1}, "num_classes is -1"),
        ("deit_testing", {"dtype": "float16"}, "expected float32 or bfloat16"),
        ("deit_testing", {"image_size": 3}, "smaller than one patch"),
        ("deit_testing", {"num_heads": 5}, "embed_dim 64 is not divisible by num_heads 5"),
        ("resmlp_testing", {"attention": "xla"}, 'no option "attention"'),
        ("resmlp_testing", {"mlp_ratio": 1e-3}, "leaves no hidden unit"),
        ("deit_testing", {"drop_path_rate": 1.0}, "drop_path_rate is 1.0"),
        ("deit_testing", {"drop_path_mode": "cosine"}, "drop_path_mode is 'cosine'"),
        ("deit_testing", {"rope": "2d"}, 'rope is \'2d\', expected "none", "axial", "mixed" or'),
        ("deit_testing", {"rope": "axial", "embed_dim": 12}, "6 channels are not divisible by 4"),
        ("vit5_testing", {"num_registers": 3}, "num_registers is 3, but rope .vit5. lays"),
    ],
)
def test_bad_arguments_are_named(name, arguments, message):
    with pytest.raises(InputError, match=message) as error:
        abstract_model(name, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in TESTING if "3" not in name])
@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, 3, 32, 32), "float32", r"shape \(2, 3, 32, 32\), expected \[batch, "),
        ((2, 32, 32, 3), "uint8", "images have dtype uint8"),
    ],
)
def test_wrong_images_are_named(name, shape, dtype, message):
    with pytest.raises(InputError, match=message):
        jax.eval_shape(abstract_model(name), jax.ShapeDtypeStruct(shape, dtype))


def test_without_rngs_it_is_the_same_model_every_time():
    found, expected = (
        jax.tree.leaves(nnx.state(create_model("deit_testing", **options)))
        for options in ({}, {"rngs": nnx.Rngs(0)})
    )
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
