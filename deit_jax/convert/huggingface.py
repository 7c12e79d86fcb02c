"""Folders as transformers and timm write them: `config.json` beside the weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deit_jax import imagenet
from deit_jax.convert import mapping, torch_files, vit_keys
from deit_jax.errors import InputError, brief
from deit_jax.models import registry
from deit_jax.models.registry import ModelInfo
from deit_jax.steps import Variables

LAYER_NORM_EPS = 1e-6
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_INFO = "deit_jax"


def weights_file(folder: Path) -> Path:
    """The file with the weights in a folder. Raises InputError without one."""
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    if (folder / "model.json").is_file():
        raise InputError(f"{folder} is a model folder of deit-jax already; use it as it is")
    raise InputError(
        f"{folder}: none of {', '.join(_WEIGHTS)} in it; name the file with the weights itself"
    )


def read_description(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """What a folder says about its model.

    Returns:
      Fields of ModelInfo, as far as it says (sizes come from the tensors), or the whole `info`
      where we wrote the folder, or `num_heads`; and notices.

    Raises:
      InputError: a JSON file is damaged, or we wrote the description and it is.
    """
    config = _read_json(folder / "config.json")
    if config is None:
        return {}, []
    try:
        if _INFO in config:
            return {"info": ModelInfo.from_json(config[_INFO])}, []
        if "architecture" in config:
            return _timm_description(config), []
        return _transformers_description(config, folder)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{folder / 'config.json'} is damaged ({brief(error)})") from error


def _read_json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged ({brief(error)}); download it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a {type(content).__name__}, expected a JSON object")
    return content


def _timm_description(config: dict[str, Any]) -> dict[str, Any]:
    settings = config.get("pretrained_cfg", config)
    fields: dict[str, Any] = {}
    if config["architecture"] in registry.list_models():
        fields["name"] = config["architecture"]
    for ours, theirs in (("mean", "mean"), ("std", "std")):
        if theirs in settings:
            fields[ours] = _three(settings[theirs])
    if "crop_pct" in settings:
        fields["crop_ratio"] = float(settings["crop_pct"])
    if "interpolation" in settings:
        fields["interpolation"] = str(settings["interpolation"])
    if "label_names" in config:
        fields["class_names"] = tuple(map(str, config["label_names"]))
    return fields


def _transformers_description(
    config: dict[str, Any], folder: Path
) -> tuple[dict[str, Any], list[str]]:
    fields: dict[str, Any] = {}
    notices = []
    eps = float(config.get("layer_norm_eps", 1e-12))
    if eps != LAYER_NORM_EPS:
        notices.append(
            f"config.json asks for layer_norm_eps {eps:g}; computed with {LAYER_NORM_EPS:g}, with "
            "which DeiT was trained, so that logits differ from transformers' by about 1e-4"
        )
    if "num_attention_heads" in config:  # which the shapes of the weights do not show
        fields["num_heads"] = int(config["num_attention_heads"])
    labels = config.get("id2label")
    if labels:
        fields["class_names"] = tuple(str(labels[str(i)]) for i in range(len(labels)))
    processor = _read_json(folder / "preprocessor_config.json")
    if processor:
        fields["mean"] = _three(processor.get("image_mean", registry.IMAGENET_MEAN))
        fields["std"] = _three(processor.get("image_std", registry.IMAGENET_STD))
        if "resample" in processor:
            fields["interpolation"] = Image.Resampling(processor["resample"]).name.lower()
        crop, size = (_side(processor.get(key)) for key in ("crop_size", "size"))
        if not processor.get("do_center_crop", False):
            crop = size
        if crop and size:
            fields["crop_ratio"] = crop / size
    return fields, notices


def _three(values: Any) -> tuple[float, float, float]:
    first, second, third = (float(value) for value in values)
    return first, second, third


def _side(size: Any) -> int | None:
    """The (shorter) side in pixels of transformers' size, which is a number or a dict."""
    if isinstance(size, dict):
        size = size.get("shortest_edge", size.get("height"))
    return int(size) if size else None


def check(info: ModelInfo) -> None:
    """Raises InputError for the models that transformers does not have."""
    options = registry.model_options(info.name) | dict(info.overrides)
    if "embed_dim" not in options or options.get("layer_scale_init") is not None:
        raise InputError(
            f"{info.name}: transformers' ViT and DeiT have no LayerScale and are no RegNetY; "
            "use --format timm"
        )


def write_folder(folder: Path, variables: Variables, info: ModelInfo) -> None:
    """Writes `config.json`, `preprocessor_config.json` and `model.safetensors` into a new folder.

    Plain DeiT becomes a ViTForImageClassification, a distilled one a
    DeiTForImageClassificationWithTeacher, both with LayerNorm's eps at 1e-6.

    Raises:
      InputError: transformers has no such model (DeiT III, RegNetY), or the disk refuses.
    """
    check(info)
    options = registry.model_options(info.name) | dict(info.overrides)
    distilled = options.get("distilled", False)
    layout = vit_keys.HF_DEIT if distilled else vit_keys.HF_VIT
    tensors = mapping.from_variables(variables, layout)
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        torch_files.write(fresh / _WEIGHTS[0], tensors)
        for name, content in (
            ("config.json", _config(info, options, distilled)),
            ("preprocessor_config.json", _processor(info)),
        ):
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (fresh / name).write_text(text, encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        fresh.rename(folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({brief(error)})") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _config(info: ModelInfo, options: dict[str, Any], distilled: bool) -> dict[str, Any]:
    names = info.class_names or tuple(f"LABEL_{i}" for i in range(info.num_classes))
    names = tuple(imagenet.readable(name) for name in names)
    dim = options["embed_dim"]
    return {
        "architectures": [
            "DeiTForImageClassificationWithTeacher" if distilled else "ViTForImageClassification"
        ],
        "model_type": "deit" if distilled else "vit",
        "hidden_size": dim,
        "num_hidden_layers": options["depth"],
        "num_attention_heads": options["num_heads"],
        "intermediate_size": int(dim * options.get("mlp_ratio", 4.0)),
        "hidden_act": "gelu",
        "layer_norm_eps": LAYER_NORM_EPS,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "image_size": info.image_size,
        "patch_size": options.get("patch_size", 16),
        "num_channels": 3,
        "dtype": str(np.dtype(np.float32)),
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        _INFO: info.to_json(),
    }


def _processor(info: ModelInfo) -> dict[str, Any]:
    """Resize the short side, cut the centre: what CLIP's processor does and DeiT's does not."""
    size = info.image_size
    whole = info.crop_ratio is None
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size}
        if whole
        else {"shortest_edge": int(size / info.crop_ratio)},
        "resample": int(Image.Resampling[info.interpolation.upper()]),
        "do_center_crop": not whole,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(info.mean),
        "image_std": list(info.std),
    }
