"""What was published of the registered models on ImageNet-1k, and where their weights are.

A test compares parameters and GMACs with the models (`python -m experiments.model_table --count`).
"""

from typing import NamedTuple


class Figures(NamedTuple):
    """Facts about a model with 1000 classes.

    `gmacs` are billions of multiplications for one image; `top1` is the percentage that the authors
    published for the weights of `tag` at the model's image size, None where they published none;
    `tag` names these weights among timm's, on the Hugging Face hub, "" where timm has none.
    """

    parameters: int
    gmacs: float
    top1: float | None = None
    tag: str = ""


class ModelRow(NamedTuple):
    """A registered model, as `list_models(details=True)` describes it.

    `image_size` is a side in pixels; `parameters`, `gmacs` and `top1` are as in Figures; `weights`
    is what `load_model` and `deit-jax convert --src` take, `licence` theirs, both "" where timm has
    none.
    """

    name: str
    family: str
    parameters: int
    image_size: int
    gmacs: float
    top1: float | None
    weights: str
    licence: str = ""


# Of the weights, by their tags, as timm states them (docs/weights.md).
LICENCES = {
    **dict.fromkeys(("fb_in1k", "fb_dist_in1k", "deit_in1k", "naver_in1k"), "apache-2.0"),
    "pycls_in1k": "mit",
    "": "",
}


def row(name: str, image_size: int) -> ModelRow:
    """Returns the description of a registered model."""
    parameters, gmacs, top1, tag = FIGURES[name]
    words = set(name.split("_"))
    kinds = (family for mark, family in _FAMILIES.items() if mark in words)
    size = parameters, image_size, gmacs
    return ModelRow(name, next(kinds), *size, top1, weights_of(name), LICENCES[tag])


def weights_of(name: str) -> str:
    """Returns where the published weights of a registered model are, "" where timm has none."""
    tag = FIGURES[name].tag
    return f"hf:timm/{name}.{tag}" if tag else ""


_FAMILIES = {  # by a word of the name; the first counts
    **dict.fromkeys(("36x1", "18x2", "parallel", "hmlp"), "Three things"),
    **{"rope": "RoPE-ViT", "deit": "DeiT", "deit3": "DeiT III", "vit5": "ViT-5"},
    **{"cait": "CaiT", "resmlp": "ResMLP", "regnety": "RegNetY"},
}


FIGURES = {
    "deit_tiny_patch16_224": Figures(5_717_416, 1.25, 72.2, "fb_in1k"),
    "deit_small_patch16_224": Figures(22_050_664, 4.60, 79.9, "fb_in1k"),
    "deit_base_patch16_224": Figures(86_567_656, 17.56, 81.8, "fb_in1k"),
    "deit_base_patch16_384": Figures(86_859_496, 55.48, 82.9, "fb_in1k"),
    "deit_tiny_distilled_patch16_224": Figures(5_910_800, 1.26, 74.5, "fb_in1k"),
    "deit_small_distilled_patch16_224": Figures(22_436_432, 4.62, 81.2, "fb_in1k"),
    "deit_base_distilled_patch16_224": Figures(87_338_192, 17.66, 83.4, "fb_in1k"),
    "deit_base_distilled_patch16_384": Figures(87_630_032, 55.59, 85.2, "fb_in1k"),
    "deit3_tiny_patch16_224": Figures(5_721_832, 1.25),
    "deit3_small_patch16_224": Figures(22_059_496, 4.60, 81.4, "fb_in1k"),
    "deit3_small_patch16_384": Figures(22_205_416, 15.49, 83.4, "fb_in1k"),
    "deit3_medium_patch16_224": Figures(38_849_512, 7.99, 83.0, "fb_in1k"),
    "deit3_base_patch16_224": Figures(86_585_320, 17.56, 83.8, "fb_in1k"),
    "deit3_base_patch16_384": Figures(86_877_160, 55.48, 85.0, "fb_in1k"),
    "deit3_large_patch16_224": Figures(304_374_760, 61.55, 84.9, "fb_in1k"),
    "deit3_large_patch16_384": Figures(304_763_880, 191.07, 85.8, "fb_in1k"),
    "deit3_huge_patch14_224": Figures(632_126_440, 167.30, 85.2, "fb_in1k"),
    "deit3_small_patch16_36x1_224": Figures(64_665_064, 13.68),
    "deit3_small_patch16_18x2_224": Figures(64_665_064, 13.68),
    "deit3_base_patch16_36x1_224": Figures(256_731_112, 52.46),
    "deit3_base_patch16_18x2_224": Figures(256_731_112, 52.46),
    "deit3_small_hmlp_224": Figures(21_954_856, 4.61),
    "deit3_base_hmlp_224": Figures(86_744_680, 17.71),
    "vit_small_patch16_36x1_224": Figures(64_665_448, 13.68),
    "vit_small_patch16_18x2_224": Figures(64_665_448, 13.68),
    "vit_base_patch16_18x2_224": Figures(256_731_880, 52.46),
    "cait_xxs24_224": Figures(11_956_264, 2.52, 78.4, "fb_dist_in1k"),
    "cait_xxs24_384": Figures(12_029_224, 9.60, 81.0, "fb_dist_in1k"),
    "cait_xxs36_224": Figures(17_299_720, 3.76, 79.8, "fb_dist_in1k"),
    "cait_xxs36_384": Figures(17_372_680, 14.31, 82.2, "fb_dist_in1k"),
    "cait_xs24_384": Figures(26_670_088, 19.24, 84.1, "fb_dist_in1k"),
    "cait_s24_224": Figures(46_916_200, 9.33, 83.5, "fb_dist_in1k"),
    "cait_s24_384": Figures(47_062_120, 32.11, 85.1, "fb_dist_in1k"),
    "cait_s36_384": Figures(68_366_632, 47.91, 85.4, "fb_dist_in1k"),
    "cait_m36_384": Figures(271_221_352, 172.94, 86.1, "fb_dist_in1k"),
    "cait_m48_448": Figures(356_460_520, 329.11, 86.5, "fb_dist_in1k"),
    "resmlp_12_224": Figures(15_350_872, 3.01, 76.7, "fb_in1k"),
    "resmlp_24_224": Figures(30_020_680, 5.96, 79.4, "fb_in1k"),
    "resmlp_36_224": Figures(44_690_488, 8.91, 79.8, "fb_in1k"),
    "resmlp_big_24_224": Figures(129_138_280, 100.23, 81.0, "fb_in1k"),
    "vit_small_patch16_rope_224": Figures(21_984_232, 4.60, 80.9, "naver_in1k"),
    "vit_small_patch16_rope_ape_224": Figures(22_059_496, 4.60, 80.7, "naver_in1k"),
    "vit_small_patch16_rope_mixed_224": Figures(21_988_840, 4.60, 80.9, "naver_in1k"),
    "vit_small_patch16_rope_mixed_ape_224": Figures(22_064_104, 4.60, 80.9, "naver_in1k"),
    "vit_base_patch16_rope_224": Figures(86_434_792, 17.56, 83.6, "naver_in1k"),
    "vit_base_patch16_rope_ape_224": Figures(86_585_320, 17.56, 83.7, "naver_in1k"),
    "vit_base_patch16_rope_mixed_224": Figures(86_444_008, 17.56, 83.8, "naver_in1k"),
    "vit_base_patch16_rope_mixed_ape_224": Figures(86_594_536, 17.56, 83.8, "naver_in1k"),
    "vit_large_patch16_rope_224": Figures(304_174_056, 61.55, 84.7, "naver_in1k"),
    "vit_large_patch16_rope_ape_224": Figures(304_374_760, 61.55, 84.7, "naver_in1k"),
    "vit_large_patch16_rope_mixed_224": Figures(304_198_632, 61.55, 84.8, "naver_in1k"),
    "vit_large_patch16_rope_mixed_ape_224": Figures(304_399_336, 61.55, 84.9, "naver_in1k"),
    "vit5_small_patch16_224": Figures(22_039_144, 4.70, 82.2),
    "vit5_base_patch16_224": Figures(86_543_080, 17.93, 84.2),
    "vit5_base_patch16_384": Figures(86_834_920, 55.91, 85.4),
    "vit5_large_patch16_224": Figures(304_258_024, 62.84, 84.9),
    "vit5_large_patch16_384": Figures(304_647_144, 192.50, 86.0),
    "vit5_xlarge_patch16_224": Figures(448_505_128, 92.41),
    "regnety_002": Figures(3_162_996, 0.20, None, "pycls_in1k"),
    "regnety_004": Figures(4_344_144, 0.40, None, "pycls_in1k"),
    "regnety_006": Figures(6_055_160, 0.60, None, "pycls_in1k"),
    "regnety_008": Figures(6_263_168, 0.80, None, "pycls_in1k"),
    "regnety_016": Figures(11_202_430, 1.61, None, "pycls_in1k"),
    "regnety_032": Figures(19_436_338, 3.18, None, "pycls_in1k"),
    "regnety_040": Figures(20_646_656, 3.97, None, "pycls_in1k"),
    "regnety_064": Figures(30_583_252, 6.36, None, "pycls_in1k"),
    "regnety_080": Figures(39_180_068, 7.96, None, "pycls_in1k"),
    "regnety_120": Figures(51_822_544, 12.09, None, "pycls_in1k"),
    "regnety_160": Figures(83_590_140, 15.91, 82.9, "deit_in1k"),
    "regnety_320": Figures(145_046_770, 32.28, None, "pycls_in1k"),
    "deit_testing": Figures(272_424, 0.02),
    "deit_testing_distilled": Figures(337_552, 0.02),
    "deit3_testing": Figures(272_872, 0.02),
    "parallel_testing": Figures(473_320, 0.03),
    "hmlp_testing": Figures(272_072, 0.00),
    "cait_testing": Figures(373_144, 0.02),
    "resmlp_testing": Figures(218_792, 0.01),
    "regnety_testing": Figures(306_024, 0.00),
    "vit5_testing": Figures(272_040, 0.02),
    "vit_testing_rope": Figures(268_776, 0.02),
    "vit_testing_rope_mixed_ape": Figures(273_128, 0.02),
}
