"""How images are prepared for weights: what a file says, what was asked for, what is assumed."""

import re
from pathlib import Path
from typing import Any

from deit_jax.models.info import IMAGENET_MEAN, IMAGENET_STD, ModelInfo

FIELDS = ("mean", "std", "crop_ratio", "interpolation")  # of ModelInfo
_HALF = (0.5, 0.5, 0.5)
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# timm's transformers of DeiT's structure. Their images are scaled to [-1, 1], but for the tags
# below; those of its deit*, deit3* and regnety* have ImageNet's mean and std.
_TIMM = re.compile(r"(vit_(?:tiny|small|base)_patch(?:8|16|32)_(224|384))(?:[._]([a-z0-9]+))?")
_TAGS = {
    "bamboo": {"mean": _CLIP_MEAN, "std": _CLIP_STD, "crop_ratio": 1.0},
    "dino": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD},
    "mae": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD},
}


def of_timm(name: str) -> tuple[str, dict[str, Any]] | None:
    """Returns the name of one of timm's vit_* in a text, and its FIELDS; None without one."""
    if not (found := _TIMM.search(name)):
        return None
    model, size, tag = found.groups()
    fields = {"mean": _HALF, "std": _HALF, "crop_ratio": 0.9 if size == "224" else 1.0}
    return model, fields | {"interpolation": "bicubic"} | _TAGS.get(tag, {})


def settle(
    described: dict[str, Any], asked: dict[str, Any], info: ModelInfo, what: str
) -> tuple[dict[str, Any], list[str]]:
    """Returns FIELDS of weights, and what a person should know about them, a line each.

    Args:
      described: what the source says, perhaps not all.
      asked: what the user says, which counts more.
      info: of the model found; its own fields count least.
      what: the path of the file; its name, or that of its folder, may be one of timm's.
    """
    said = {name: described[name] for name in FIELDS if name in described}
    notes = [
        f"{name} {value}, as asked; the file says {said[name]}"
        for name, value in asked.items()
        if name in said and value != said[name]
    ]
    fields = {name: getattr(info, name) for name in FIELDS}
    whose = f"as for {info.name}"
    if timm := of_timm("/".join(Path(what).parts[-2:])):
        whose, fields = f"as for timm's {timm[0]}", timm[1]
    missing = [name for name in FIELDS if name not in said | asked]
    if missing:
        values = ", ".join(f"{name} {_text(fields[name])}" for name in missing)
        flags = ", ".join(f"--{name}" for name in missing)
        notes.append(
            f"the file does not say how its images were prepared; assumed {values}, {whose}; "
            f"deit-jax convert takes {flags} for others"
        )
    return fields | said | asked, notes


def _text(value: Any) -> str:
    if value is None:
        return "none (the whole image)"
    return " ".join(f"{x:g}" for x in value) if isinstance(value, tuple) else str(value)
