"""Reads and writes folders of transformers: JSON files beside the weights; finds those of timm."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deit_jax import storage
from deit_jax.convert import layouts, timm_folder, torch_files
from deit_jax.convert.shards import INDICES, MOST_BYTES
from deit_jax.errors import InputError, brief
from deit_jax.models import imagenet, registry
from deit_jax.models.info import IMAGENET_MEAN, IMAGENET_STD, ModelInfo

LAYER_NORM_EPS = 1e-6
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that a folder has
CONFIGS = ("config.json", "preprocessor_config.json")
_FILES = {*CONFIGS, WEIGHTS[0]}
_INFO = "deit_jax"


def weights_file(folder: Path) -> Path:
    """Returns the file with the weights in a folder. Raises InputError without one."""
    for name in (*WEIGHTS, *INDICES):
        if (folder / name).is_file():
            return folder / name
    if (folder / "model.json").is_file():
        raise InputError(f"{folder} is a model folder of deit-jax already; use it as it is")
    names = ", ".join((*WEIGHTS, *INDICES))
    raise InputError(f"{folder}: none of {names} in it; name the file with the weights itself")


def read_description(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Reads what a folder says about its model.

    Returns:
      Fields of ModelInfo, as far as it says (sizes come from the tensors), and `num_heads`, or
      the whole `info` where we wrote the folder; and notes for a person, a line each.

    Raises:
      InputError: a JSON file is damaged or describes another kind of model.
    """
    file = folder / "config.json"
    config, processor = _read_json(file), _read_json(folder / "preprocessor_config.json")
    try:
        if _INFO in config:
            info = ModelInfo.from_json(config[_INFO])
            same = config.get("id2label") == _config(info)["id2label"]
            # transformers keeps our entry when it saves a model that was fine-tuned since.
            if same and processor == _processor(info):
                return {"info": info}, []
        if "architecture" in config:
            return timm_folder.description(config, file)
        return _transformers_description(config, processor, file)
    except InputError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{file} or its preprocessor is damaged ({brief(error)})") from error


def _read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object, without entries that are null; {} for a missing file."""
    if not file.is_file():
        return {}
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError("larger than any such file")
        content = storage.parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is damaged ({brief(error)}); download it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a {type(content).__name__}, expected a JSON object")
    return {key: value for key, value in content.items() if value is not None or key == _INFO}


def _transformers_description(
    config: dict[str, Any], processor: dict[str, Any], file: Path
) -> tuple[dict[str, Any], list[str]]:
    for key, expected in (("model_type", ("vit", "deit")), ("hidden_act", ("gelu",))):
        if config.get(key, expected[0]) not in expected:
            raise InputError(
                f"{file}: {key} is {config[key]!r:.40}, expected {' or '.join(expected)}"
            )
    fields: dict[str, Any] = {}
    notes = []
    eps = float(config.get("layer_norm_eps", 1e-12))
    if eps != LAYER_NORM_EPS:
        notes.append(
            f"config.json asks for layer_norm_eps {eps:g}, but DeiT was trained with "
            f"{LAYER_NORM_EPS:g}, which is used; logits differ from transformers' by about 1e-4"
        )
    if "num_attention_heads" in config:  # which the shapes of the weights do not show
        fields["num_heads"] = int(config["num_attention_heads"])
    labels = config.get("id2label", {})
    if set(labels) == {str(i) for i in range(len(labels))}:
        fields["class_names"] = tuple(str(labels[str(i)]) for i in range(len(labels)))
    else:
        notes.append("id2label of config.json does not number the classes from 0: no names")
    if processor:
        preprocessing, more = _preprocessing(processor)
        fields |= preprocessing
        notes += more
    return fields, notes


def _preprocessing(processor: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns ModelInfo's fields for a `preprocessor_config.json`, and notes on what is ignored."""
    odd = [
        key
        for key, usual in (("do_resize", True), ("do_rescale", True), ("rescale_factor", 1 / 255))
        if abs(float(processor.get(key, usual)) - usual) > 1e-6
    ]
    notes = [f"preprocessor_config.json: {key} {processor[key]} is not followed" for key in odd]
    fields: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    if processor.get("do_normalize", True):
        fields["mean"] = _three(processor.get("image_mean", IMAGENET_MEAN))
        fields["std"] = _three(processor.get("image_std", IMAGENET_STD))
    if "resample" in processor:
        fields["interpolation"] = Image.Resampling(processor["resample"]).name.lower()
    size, crop = (_side(processor.get(key)) for key in ("size", "crop_size"))
    if not processor.get("do_center_crop", False):
        fields["crop_ratio"] = None  # the whole image, whatever its aspect
    elif size and crop:
        if crop > size:
            raise ValueError(f"crop_size {crop} is larger than size {size}")
        ratio = crop / size
        said = processor["size"]
        kind = processor.get("image_processor_type", processor.get("feature_extractor_type", ""))
        if "height" in said if isinstance(said, dict) else kind.startswith(("DeiT", "ViT")):
            notes.append(
                f"preprocessor_config.json: transformers resizes both sides to {size}; the shorter "
                "side is resized, as DeiT was trained"
            )
        # preprocess() truncates crop / ratio, which has to give back the size.
        fields["crop_ratio"] = ratio if int(crop / ratio) == size else crop / (size + 0.5)
    return fields, notes


def _three(values: Any) -> tuple[float, float, float]:
    first, second, third = map(float, values)
    return first, second, third


def _side(size: Any) -> int | None:
    """Returns the (shorter) side in pixels of transformers' size, a number or a dict."""
    if isinstance(size, dict):
        size = size.get("shortest_edge", size.get("height"))
    return int(size) if size else None


# What transformers' ViT and DeiT are; they have no such options.
_FIXED = {
    **{"layer_scale_init": None, "no_embed_class": False, "pos_embed": True, "rope": "none"},
    **{"num_registers": 0, "norm": "layer", "qk_norm": False, "qkv_bias": True},
    **{"linear_bias": True, "hmlp": False},
}


def layout(info: ModelInfo) -> layouts.Layout:
    """Returns how transformers names the model's tensors.

    Raises:
      InputError: transformers has no such model (DeiT III, RegNetY).
    """
    _, options = info.side, registry.options(info)
    other = any(options.get(option, "none here") != value for option, value in _FIXED.items())
    if other or registry.family(info.name) != "vit":
        raise InputError(
            f"{info.name}: transformers has ViT and DeiT without LayerScale and with positions for "
            "all tokens; take timm or fb"
        )
    return layouts.HF_DEIT if options["distilled"] else layouts.HF_VIT


def is_ours(folder: storage.Path) -> bool:
    """Tells whether a folder holds what `write_folder` wrote, and nothing else."""
    config = _read_json(folder / "config.json")
    return _INFO in config and {file.name for file in folder.iterdir()} <= _FILES


def write_folder(folder: storage.Path, tensors: dict[str, np.ndarray], info: ModelInfo) -> None:
    """Writes `config.json`, `preprocessor_config.json` and `model.safetensors` into a folder.

    The tensors have the names of `layout(info)`. Plain DeiT becomes a ViTForImageClassification, a
    distilled one a DeiTForImageClassificationWithTeacher, both with LayerNorm's eps at 1e-6. A
    folder of ours is replaced when the new one is complete.

    Raises:
      InputError: the disk refuses.
    """
    if storage.is_remote(folder):
        with tempfile.TemporaryDirectory() as local:
            write_folder(Path(local, "new"), tensors, info)
            storage.copy_files(Path(local, "new"), folder)
        return
    folder = folder.absolute()
    contents = {"config.json": _config(info), "preprocessor_config.json": _processor(info)}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
            fresh = Path(beside, "new")
            torch_files.write(fresh / WEIGHTS[0], tensors)
            for name, content in contents.items():
                text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
                (fresh / name).write_text(text, encoding="utf-8")
            old = Path(beside, "old")
            if folder.exists():
                folder.rename(old)
            try:
                fresh.rename(folder)
            except BaseException:  # Ctrl-C as well: `beside` goes, and all that is in it
                if old.exists():
                    old.rename(folder)
                raise
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({brief(error)})") from error


def _config(info: ModelInfo) -> dict[str, Any]:
    options = registry.options(info)
    distilled = options["distilled"]
    kind = "DeiTForImageClassificationWithTeacher" if distilled else "ViTForImageClassification"
    names = info.class_names or tuple(f"LABEL_{i}" for i in range(info.num_classes))
    names = tuple(imagenet.readable(name) for name in names)
    dim = options["embed_dim"]
    return {
        "architectures": [kind],
        "model_type": "deit" if distilled else "vit",
        "hidden_size": dim,
        "num_hidden_layers": options["depth"],
        "num_attention_heads": options["num_heads"],
        "intermediate_size": int(dim * options["mlp_ratio"]),
        "hidden_act": "gelu",
        "layer_norm_eps": LAYER_NORM_EPS,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "image_size": info.side,
        "patch_size": options["patch_size"],
        "num_channels": 3,
        "dtype": "float32",
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        _INFO: info.to_json(),
    }


def _processor(info: ModelInfo) -> dict[str, Any]:
    """Describes our evaluation: resize the short side, cut the centre."""
    size = info.side
    whole = info.crop_ratio is None
    return {
        "image_processor_type": "CLIPImageProcessor",  # DeiT's resizes both sides
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
