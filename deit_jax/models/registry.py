"""Lists the models by name and creates them."""

import dataclasses
import difflib
import fnmatch
import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from deit_jax.errors import InputError
from deit_jax.models import figures
from deit_jax.models.cait import Cait
from deit_jax.models.figures import ModelRow
from deit_jax.models.info import BOOL, ModelInfo, checked, number, one_of
from deit_jax.models.parallel import ParallelVisionTransformer
from deit_jax.models.regnet import RegNetY
from deit_jax.models.resmlp import ResMlp
from deit_jax.models.vit import VisionTransformer

# Options that change how a model is trained or computed, but neither its weights nor what it
# predicts: no part of its description.
_RATE = number(lambda value: 0 <= value < 1, "a number from 0 to below 1")
TRAINING_OPTIONS = {
    "attention": one_of("auto", "xla", "xla_remat", "pallas", "cudnn"),
    "drop_rate": _RATE,
    "dynamic_image_size": BOOL,
    "drop_path_mode": one_of("linear", "constant"),
    "remat": BOOL,
}
_FAMILIES = {
    VisionTransformer: "vit",
    ParallelVisionTransformer: "parallel",
    Cait: "cait",
    ResMlp: "resmlp",
    RegNetY: "regnet",
}
_OWN = {"num_classes", "image_size", "drop_path_rate", "dtype"}  # named arguments of create_model


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One row of the table: the constructor, its arguments, image size and evaluation crop."""

    build: Callable[..., nnx.Module]
    options: dict[str, Any]
    image_size: int = 224
    crop_ratio: float | None = 0.875


def _deit(
    dim: int, depth: int, heads: int, image_size: int = 224, *, distilled: bool = False
) -> _Entry:
    options = {"embed_dim": dim, "depth": depth, "num_heads": heads, "distilled": distilled}
    return _Entry(VisionTransformer, options, image_size)


def _deit3(
    dim: int, depth: int, heads: int, image_size: int = 224, *, patch_size: int = 16
) -> _Entry:
    options = {"embed_dim": dim, "depth": depth, "num_heads": heads, "patch_size": patch_size}
    options |= {"no_embed_class": True, "layer_scale_init": 1e-4, "drop_path_mode": "constant"}
    return _Entry(VisionTransformer, options, image_size, crop_ratio=1.0)


def _deep(dim: int, depth: int, heads: int) -> _Entry:
    """timm's models of "Three things": unlike the paper's, all tokens have positions."""
    return _entry_with(_deit3(dim, depth, heads), no_embed_class=False, layer_scale_init=1e-5)


def _parallel(entry: _Entry) -> _Entry:
    return dataclasses.replace(entry, build=ParallelVisionTransformer)


def _entry_with(entry: _Entry, **options: Any) -> _Entry:
    return dataclasses.replace(entry, options=entry.options | options)


def _cait(dim: int, depth: int, heads: int, image_size: int, scale: float) -> _Entry:
    options = {"embed_dim": dim, "depth": depth, "num_heads": heads, "layer_scale_init": scale}
    return _Entry(Cait, options, image_size, crop_ratio=1.0)


def _resmlp(dim: int, depth: int, scale: float, *, patch_size: int = 16) -> _Entry:
    options = {"embed_dim": dim, "depth": depth, "patch_size": patch_size}
    return _Entry(ResMlp, options | {"layer_scale_init": scale}, crop_ratio=0.9)


def _rope(dim: int, depth: int, heads: int, rope: str, *, pos_embed: bool = False) -> _Entry:
    return _entry_with(_deit3(dim, depth, heads), rope=rope, pos_embed=pos_embed)


def _rope_names() -> dict[str, _Entry]:
    """Returns RoPE-ViT under timm's names: three sizes, axial or mixed, perhaps with pos_embed."""
    sizes = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
    return {
        f"vit_{size}_patch16_rope{kind}{ape}_224": _rope(
            *shape, "mixed" if kind else "axial", pos_embed=bool(ape)
        )
        for size, shape in sizes.items()
        for kind in ("", "_mixed")
        for ape in ("", "_ape")
    }


def _vit5(dim: int, depth: int, heads: int, image_size: int = 224) -> _Entry:
    switches = {"rope": "vit5", "num_registers": 4, "norm": "rms", "qk_norm": True}
    return _entry_with(_deit3(dim, depth, heads, image_size), **switches, qkv_bias=False)


def _regnety(w0: int, wa: float, wm: float, group_width: int, depth: int) -> _Entry:
    options = {"w0": w0, "wa": wa, "wm": wm, "group_width": group_width, "depth": depth}
    return _Entry(RegNetY, options)


def _testing(entry: _Entry, **options: Any) -> _Entry:
    """Shrinks an entry to 32×32 images that are evaluated whole."""
    return dataclasses.replace(_entry_with(entry, **options), image_size=32, crop_ratio=None)


_MODELS = {
    "deit_tiny_patch16_224": _deit(192, 12, 3),
    "deit_small_patch16_224": _deit(384, 12, 6),
    "deit_base_patch16_224": _deit(768, 12, 12),
    "deit_base_patch16_384": _deit(768, 12, 12, 384),
    "deit_tiny_distilled_patch16_224": _deit(192, 12, 3, distilled=True),
    "deit_small_distilled_patch16_224": _deit(384, 12, 6, distilled=True),
    "deit_base_distilled_patch16_224": _deit(768, 12, 12, distilled=True),
    "deit_base_distilled_patch16_384": _deit(768, 12, 12, 384, distilled=True),
    "deit3_tiny_patch16_224": _deit3(192, 12, 3),
    "deit3_small_patch16_224": _deit3(384, 12, 6),
    "deit3_small_patch16_384": _deit3(384, 12, 6, 384),
    "deit3_medium_patch16_224": _deit3(512, 12, 8),
    "deit3_base_patch16_224": _deit3(768, 12, 12),
    "deit3_base_patch16_384": _deit3(768, 12, 12, 384),
    "deit3_large_patch16_224": _deit3(1024, 24, 16),
    "deit3_large_patch16_384": _deit3(1024, 24, 16, 384),
    "deit3_huge_patch14_224": _deit3(1280, 32, 16, patch_size=14),
    "deit3_small_patch16_36x1_224": _deit3(384, 36, 6),
    "deit3_small_patch16_18x2_224": _parallel(_deit3(384, 18, 6)),
    "deit3_base_patch16_36x1_224": _deit3(768, 36, 12),
    "deit3_base_patch16_18x2_224": _parallel(_deit3(768, 18, 12)),
    "deit3_small_hmlp_224": _entry_with(_deit3(384, 12, 6), hmlp=True),
    "deit3_base_hmlp_224": _entry_with(_deit3(768, 12, 12), hmlp=True),
    "vit_small_patch16_36x1_224": _deep(384, 36, 6),
    "vit_small_patch16_18x2_224": _parallel(_deep(384, 18, 6)),
    "vit_base_patch16_18x2_224": _parallel(_deep(768, 18, 12)),
    "cait_xxs24_224": _cait(192, 24, 4, 224, 1e-5),
    "cait_xxs24_384": _cait(192, 24, 4, 384, 1e-5),
    "cait_xxs36_224": _cait(192, 36, 4, 224, 1e-5),
    "cait_xxs36_384": _cait(192, 36, 4, 384, 1e-5),
    "cait_xs24_384": _cait(288, 24, 6, 384, 1e-5),
    "cait_s24_224": _cait(384, 24, 8, 224, 1e-5),
    "cait_s24_384": _cait(384, 24, 8, 384, 1e-5),
    "cait_s36_384": _cait(384, 36, 8, 384, 1e-6),
    "cait_m36_384": _cait(768, 36, 16, 384, 1e-6),
    "cait_m48_448": _cait(768, 48, 16, 448, 1e-6),  # in bfloat16 it loses: evaluate in float32
    "resmlp_12_224": _resmlp(384, 12, 0.1),
    "resmlp_24_224": _resmlp(384, 24, 1e-5),
    "resmlp_36_224": _resmlp(384, 36, 1e-6),
    "resmlp_big_24_224": _resmlp(768, 24, 1e-6, patch_size=8),
    **_rope_names(),
    "vit5_small_patch16_224": _vit5(384, 12, 6),
    "vit5_base_patch16_224": _vit5(768, 12, 12),
    "vit5_base_patch16_384": _vit5(768, 12, 12, 384),
    "vit5_large_patch16_224": _vit5(1024, 24, 16),
    "vit5_large_patch16_384": _vit5(1024, 24, 16, 384),
    "vit5_xlarge_patch16_224": _vit5(1152, 28, 16),
    "regnety_002": _regnety(24, 36.44, 2.49, 8, 13),
    "regnety_004": _regnety(48, 27.89, 2.09, 8, 16),
    "regnety_006": _regnety(48, 32.54, 2.32, 16, 15),
    "regnety_008": _regnety(56, 38.84, 2.4, 16, 14),
    "regnety_016": _regnety(48, 20.71, 2.65, 24, 27),
    "regnety_032": _regnety(80, 42.63, 2.66, 24, 21),
    "regnety_040": _regnety(96, 31.41, 2.24, 64, 22),
    "regnety_064": _regnety(112, 33.22, 2.27, 72, 25),
    "regnety_080": _regnety(192, 76.82, 2.19, 56, 17),
    "regnety_120": _regnety(168, 73.36, 2.37, 112, 19),
    "regnety_160": _regnety(200, 106.23, 2.48, 112, 18),
    "regnety_320": _regnety(232, 115.89, 2.53, 232, 20),
    # Small enough for a laptop and for tests.
    "deit_testing": _testing(_deit(64, 4, 2), patch_size=4),
    "deit_testing_distilled": _testing(_deit(64, 4, 2, distilled=True), patch_size=4),
    "deit3_testing": _testing(_deit3(64, 4, 2, patch_size=4)),
    "parallel_testing": _testing(_parallel(_deit3(64, 4, 2)), patch_size=4),
    "hmlp_testing": _testing(_entry_with(_deit3(64, 4, 2), hmlp=True)),
    "cait_testing": _testing(_cait(64, 4, 2, 32, 1e-5), patch_size=4),
    "resmlp_testing": _testing(_resmlp(64, 4, 0.1, patch_size=4)),
    "regnety_testing": _testing(_regnety(16, 16.0, 2.0, 32, 6), stem_width=16),
    "vit5_testing": _testing(_vit5(64, 4, 2), patch_size=4),
    "vit_testing_rope": _testing(_rope(64, 4, 2, "axial"), patch_size=4),
    "vit_testing_rope_mixed_ape": _testing(_rope(64, 4, 2, "mixed", pos_embed=True), patch_size=4),
}


def list_models(pattern: str = "*", *, details: bool = False) -> list[str] | list[ModelRow]:
    """Returns the sorted names that match a shell-style pattern, for instance "deit3*".

    With `details` a ModelRow for each. Models for tests need "testing" in the pattern.
    """
    names = [n for n in names_of(pattern) if "testing" in pattern or "testing" not in n]
    return [figures.row(name, _MODELS[name].image_size) for name in names] if details else names


def names_of(pattern: str = "*") -> list[str]:
    """Returns the sorted names that match a pattern, with the models for tests."""
    return sorted(fnmatch.filter(_MODELS, pattern))


def model_options(name: str) -> dict[str, Any]:
    """Returns the registered arguments of a model's constructor, and its `image_size`.

    Raises:
      InputError: unknown name.
    """
    entry = _entry(name)
    return entry.options | {"image_size": entry.image_size}


def options(info: ModelInfo) -> dict[str, Any]:
    """Returns the arguments of the constructor of the model that `info` describes, defaults too."""
    parameters = inspect.signature(_entry(info.name).build.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return defaults | model_options(info.name) | dict(info.overrides)


def family(name: str) -> str:
    """Returns what a registered model's layers are: a value of `_FAMILIES`."""
    return _FAMILIES[_entry(name).build]


def can_distil(name: str, options: dict[str, Any] | None = None) -> bool:
    """Tells whether a teacher may teach a model: by a token, or, as published, its one head."""
    return is_distilled(name, options) or family(name) in ("cait", "resmlp")


def is_distilled(name: str, options: dict[str, Any] | None = None) -> bool:
    """Tells whether a model has a distillation token and head; `options` replace its own."""
    return (_entry(name).options | (options or {})).get("distilled", False)


def fixed_size(info: ModelInfo) -> int | None:
    """Returns the side of the only images that a model takes, or None where it takes any."""
    return None if family(info.name) == "regnet" else info.side


def model_info(name: str, **fields: Any) -> ModelInfo:
    """Returns the registry's description of a model; `fields` of ModelInfo replace its values.

    Raises:
      InputError: unknown name.
    """
    entry = _entry(name)
    size = {"image_size": entry.image_size, "crop_ratio": entry.crop_ratio}
    return ModelInfo(name, **({"num_classes": 1000} | size | fields))


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    image_size: int | tuple[int, int] | None = None,
    drop_path_rate: float = 0.0,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs | None = None,
    **overrides: Any,
) -> nnx.Module:
    """Creates a randomly initialised model; `deit_jax.create_model` without published weights.

    Args and Returns are described there; `overrides` are its `options`.

    Raises:
      InputError: unknown name or override, or values that do not fit.
    """
    entry = _entry(name)
    known = set(inspect.signature(entry.build.__init__).parameters) - {"self", "rngs"} | _OWN
    for option in overrides:
        if option not in known:
            suggestion = _suggest(option, known)
            raise InputError(f'model {name} has no option "{option}"{suggestion}')
    overrides = {
        option: checked(option, value, TRAINING_OPTIONS.get(option))
        for option, value in overrides.items()
    }
    dtype, drop_path_rate = _dtype(dtype), checked("drop_path_rate", drop_path_rate, _RATE)
    if rngs is None:
        rngs = nnx.Rngs(0)
    if getattr(rngs, "params", None) is None:
        raise InputError(
            f"rngs is a {type(rngs).__name__} that draws no params, expected nnx.Rngs(seed)"
        )

    structural = sorted(pair for pair in overrides.items() if pair[0] not in TRAINING_OPTIONS)
    size = entry.image_size if image_size is None else image_size
    info = model_info(name, num_classes=num_classes, image_size=size, overrides=structural)
    arguments = entry.options | overrides | {"num_classes": info.num_classes, "dtype": dtype}
    if entry.build is not RegNetY:
        arguments |= {"image_size": info.image_size, "drop_path_rate": drop_path_rate}
    elif drop_path_rate:
        raise InputError(
            f"drop_path_rate is {drop_path_rate}, but {name} has no stochastic depth: set it to 0"
        )
    model = entry.build(**arguments, rngs=rngs)
    model.info = info
    return model


def abstract_model(name: str, **options: Any) -> nnx.Module:
    """Returns what `create_model(name, **options)` would, with shapes in place of arrays."""
    return nnx.eval_shape(lambda: create_model(name, rngs=nnx.Rngs(0), **options))


def _dtype(dtype: DTypeLike) -> jnp.dtype:
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = dtype
    if found not in (jnp.float32, jnp.bfloat16):
        raise InputError(f"dtype is {found}, expected float32 or bfloat16")
    return found


def _entry(name: str) -> _Entry:
    if not isinstance(name, str) or name not in _MODELS:
        raise InputError(f'unknown model "{name}"{_suggest(str(name), _MODELS)}')
    return _MODELS[name]


def _suggest(name: str, known: Any) -> str:
    if close := difflib.get_close_matches(name, sorted(known), n=3):
        return f": did you mean {', '.join(close)}?"
    return f"; expected one of {', '.join(sorted(known))}"
