"""Writes and reads the `config.json` that timm keeps beside the weights, as on the hub."""

from collections.abc import Mapping
from pathlib import Path
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
# Arguments of timm's that change no logits; and those that names and shapes of tensors show.
_IDLE = {
    *("img_size", "dynamic_img_size", "dynamic_img_pad", "strict_img_size", "weight_init"),
    *("fix_init", "zero_init_last", "drop_rate", "drop_path_rate", "drop_block_rate"),
}
_SHOWN = {
    *_ARGUMENTS.values(),
    *("num_classes", "in_chans", "class_token", "reg_tokens", "pos_embed", "qk_norm"),
    *("scale_attn_norm", "scale_mlp_norm", "proj_bias", "pre_norm", "final_norm", "fc_norm"),
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


def description(config: Mapping[str, Any], file: Path) -> tuple[dict[str, Any], list[str]]:
    """Reads what a `config.json` of timm's says.

    Args:
      config: its content, without entries that are null.
      file: names it in errors.

    Returns:
      Fields of ModelInfo, `model` and `num_heads`, as far as it says; and notes for a person.

    Raises:
      InputError: it describes a model that is not ours, though the tensors may be the same.
    """
    architecture, arguments = config["architecture"], config.get("model_args", {})
    fields, notes = _preparation(config.get("pretrained_cfg", config))
    if architecture in registry.names_of():
        fields["model"] = architecture
    if "label_names" in config:
        fields["class_names"] = tuple(map(str, config["label_names"]))
    if arguments.get("num_heads") is not None:  # which the shapes of the weights do not show
        fields["num_heads"] = int(arguments["num_heads"])
    cnn = architecture.startswith("regnet")
    own = {
        "global_pool": "avg" if cnn or architecture.startswith("resmlp") else "token",
        "act_layer": "relu" if cnn else "gelu",
        "norm_layer": "batchnorm" if cnn else "layernorm",
    }
    # Beside the arguments stands how the model pools, which the architecture alone may decide.
    pools = {name: config[name] for name in ("global_pool",) if name in config}
    for name, value in (pools | arguments).items():
        idle = value is None or name in _IDLE | _SHOWN or name.endswith("_drop_rate")
        if not idle and value != own.get(name):
            expected = f"expected {own[name]!r}" if name in own else "which is not followed"
            raise InputError(
                f"{file}: {name} is {value!r:.40}, {expected}; deit-jax has no such model"
            )
    return fields, notes


def _preparation(said: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns ModelInfo's fields for a `pretrained_cfg`, and notes on what is not followed."""
    kinds = {"mean": _numbers, "std": _numbers, "crop_pct": float, "interpolation": str}
    fields = {name: kind(said[name]) for name, kind in kinds.items() if said.get(name) is not None}
    mode, notes = said.get("crop_mode") or "center", []
    if "crop_pct" in fields:
        fields["crop_ratio"] = fields.pop("crop_pct")
    if mode == "squash" and fields.get("crop_ratio") == 1:
        fields["crop_ratio"] = None  # the whole image, whatever its aspect
    elif mode != "center":
        notes.append(
            f"config.json: crop_mode {mode!r:.40} is not followed; the shorter side is resized and "
            "the centre is cut out"
        )
    return fields, notes


def _numbers(values: Any) -> tuple[float, ...]:
    return tuple(map(float, values))
