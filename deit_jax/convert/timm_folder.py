"""Describes a model as timm does on the Hugging Face hub: the `config.json` beside the weights."""

from typing import Any

from deit_jax.errors import InputError
from deit_jax.models import figures, imagenet, registry
from deit_jax.models.info import ModelInfo

# What timm's transformers are, whatever their arguments.
_FIXED = {
    **{"num_registers": 0, "norm": "layer", "qk_norm": False},
    **{"linear_bias": True, "hmlp": False},
}
# Models whose sizes timm's arguments change, for those that timm has no name for.
_BASES = {
    "vit": "deit_tiny_patch16_224",
    "parallel": "vit_small_patch16_18x2_224",
    "cait": "cait_xxs24_224",
}
_NAMES = {"regnet": "RegNetY", "resmlp": "ResMLP"}
_ROPE = {"axial": "", "mixed": "_mixed"}
_ARGUMENTS = {  # ours, and timm's
    **{name: name for name in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")},
    **{name: name for name in ("qkv_bias", "no_embed_class", "depth_token_only")},
    "layer_scale_init": "init_values",
}


def config(info: ModelInfo) -> dict[str, Any]:
    """Returns what timm's `create_model("hf-hub:...")` builds the model and its transforms from.

    Raises:
      InputError: timm cannot build such a model by a name and numbers.
    """
    size, regnet = info.side, registry.family(info.name) == "regnet"
    by_name = regnet or registry.family(info.name) == "resmlp"
    architecture, arguments = _by_name(info) if by_name else _transformer(info)
    distilled = registry.is_distilled(info.name, dict(info.overrides))
    stem = {"regnet": "stem.conv", "resmlp": "stem.proj"}
    whole = info.crop_ratio is None
    described = {
        "architecture": architecture,
        "num_classes": info.num_classes,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "fixed_input_size": not regnet,
            "interpolation": info.interpolation,
            "crop_pct": 1.0 if whole else info.crop_ratio,
            "crop_mode": "squash" if whole else "center",
            "mean": list(info.mean),
            "std": list(info.std),
            "num_classes": info.num_classes,
            "first_conv": stem.get(registry.family(info.name), "patch_embed.proj"),
            "classifier": "head.fc" if regnet else ["head", "head_dist"] if distilled else "head",
        },
    }
    if info.class_names:
        described["label_names"] = list(info.class_names)
        readable = {name: imagenet.readable(name) for name in info.class_names}
        described["label_descriptions"] = readable
    return described


def _by_name(info: ModelInfo) -> tuple[str, dict[str, Any]]:
    if info.overrides or not _is_timms(info.name):
        family = registry.family(info.name)
        raise InputError(
            f"timm builds {_NAMES[family]} by its names alone, and has none for this {info.name}; "
            "deit-jax export-torch writes its weights"
        )
    return info.name, {}


def _transformer(info: ModelInfo) -> tuple[str, dict[str, Any]]:
    options = registry.options(info)
    rope = options.get("rope", "none")
    fixed = _FIXED | ({"pos_embed": True} if rope == "none" else {"qkv_bias": True})
    odd = [name for name, value in fixed.items() if options.get(name, value) != value]
    if odd or rope not in ("none", *_ROPE):
        what = odd[0] if odd else "rope"
        raise InputError(
            f"{info.name} has {what} {options[what]}, which no name of timm's stands for; "
            "deit-jax export-torch --format fb writes its weights"
        )
    arguments = {timms: options[ours] for ours, timms in _ARGUMENTS.items() if ours in options}
    if _is_timms(info.name):
        return info.name, arguments
    if rope != "none":
        ape = "_ape" * options["pos_embed"]
        return f"vit_small_patch16_rope{_ROPE[rope]}{ape}_224", arguments
    if registry.is_distilled(info.name, dict(info.overrides)):
        return "deit_tiny_distilled_patch16_224", arguments
    return _BASES[registry.family(info.name)], arguments


def _is_timms(name: str) -> bool:
    size = registry.model_options(name)["image_size"]
    return figures.row(name, size).weights.startswith("hf:timm/")
