"""Finds out whose tensors a file holds, and in whose names: from keys and shapes alone."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from deit_jax.convert import layouts, wrappers
from deit_jax.errors import InputError
from deit_jax.models import registry
from deit_jax.models.info import ModelInfo
from deit_jax.models.regnet import stage_plan

Tensors = Mapping[str, np.ndarray]
# A tensor of the first block of which each block has one.
_FIRST = {"resmlp": "blocks.0.linear_tokens.weight", "regnet": "s1.b1.conv1.conv.weight"}


def layout_of(tensors: Tensors, what: str) -> layouts.Layout:
    """Returns the layout in whose names the tensors are.

    Raises:
      InputError: no layout fits; names the file `what`.
    """
    for layout in layouts.ALL:
        marks = [layout.key(mark) for mark in wrappers.MARKS[layout.family]]
        if layout is layouts.REFERENCE:  # as timm's but for LayerScale
            marks.append("blocks.0.gamma_1")
        if all(mark in tensors for mark in marks):
            return layout
    some = ", ".join(list(tensors)[:4]) or "nothing"
    raise InputError(
        f"{what}: not recognised as DeiT, DeiT III, CaiT, ResMLP or RegNetY in the names of the "
        f"reference, timm, Hugging Face or torchvision; {len(tensors)} tensors, such as {some}"
    )


def identify(tensors: Tensors, layout: layouts.Layout, *, what: str) -> ModelInfo:
    """Describes the registered model of the tensors' structure; of several, the nearest in size.

    Args:
      tensors: of a file in `layout`.
      layout: as `layout_of` found it.
      what: names the file in errors.

    Raises:
      InputError: no registered model has this structure; says what was found.
    """
    if layout.family == "regnet":
        return _identify_regnet(tensors, layout, what)
    if layout.family == "resmlp":
        return _identify_resmlp(tensors, layout, what)
    return _identify_vit(tensors, layout, what)


def _shape(tensors: Tensors, key: str, ndim: int, what: str) -> tuple[int, ...]:
    if key not in tensors:
        if "deit.embeddings.cls_token" in tensors and "classifier.weight" in tensors:
            raise InputError(
                f"{what}: a DeiTForImageClassification, which has two tokens and one head, is not "
                "supported; DeiTForImageClassificationWithTeacher and ViTForImageClassification are"
            )
        raise InputError(f"{what}: no tensor {key}; the file is not a whole classifier")
    shape = tensors[key].shape
    if len(shape) != ndim or 0 in shape:
        raise InputError(f"{what}: {key} has shape {shape}, expected {ndim} axes")
    return shape


def depth_of(tensors: Tensors, layout: layouts.Layout) -> int:
    """Returns the number of blocks that the tensors are of."""
    first = _FIRST.get(layout.family, "blocks.0.attn.qkv.weight")
    last = re.split(r"(?:\.0|\.b1|-0)\.", layout.key(first), maxsplit=1)[1]
    return sum(key.endswith(f".{last}") for key in tensors)


def _identify_vit(tensors: Tensors, layout: layouts.Layout, what: str) -> ModelInfo:
    classes = _shape(tensors, layout.key("head.weight"), 2, what)[0]
    patch = _shape(tensors, layout.key("patch_embed.proj.weight"), 4, what)[2]
    _, positions, dim = _shape(tensors, layout.key("pos_embed"), 3, what)
    traits = {
        "embed_dim": dim,
        "depth": depth_of(tensors, layout),
        "distilled": layout.key("dist_token") in tensors,
        "layer_scale": layout.key("blocks.0.ls1.gamma") in tensors,
    }
    # DeiT III, which has LayerScale, gives its prefix tokens no position.
    prefix = 0 if traits["layer_scale"] else 1 + traits["distilled"]
    side = math.isqrt(max(positions - prefix, 0))
    if side == 0 or side * side + prefix != positions:
        raise InputError(
            f"{what}: {positions} position embeddings, {prefix} of them for prefix tokens, make no "
            "square grid; only square images are supported"
        )
    size = side * patch
    candidates = []
    for name in registry.list_models():
        if registry.family(name) != layout.family:
            continue
        options = {"patch_size": 16, "distilled": False} | registry.model_options(name)
        options["layer_scale"] = options.get("layer_scale_init") is not None
        if all(options.get(key) == value for key, value in traits.items()):
            distance = options["patch_size"] != patch, abs(options["image_size"] - size)
            candidates.append((*distance, name))
    if not candidates:
        found = ", ".join(f"{key} {value}" for key, value in traits.items())
        raise InputError(f"{what}: no registered model has {found}")
    other_patch, _, name = min(candidates)
    overrides = (("patch_size", patch),) if other_patch else ()
    return registry.model_info(name, num_classes=classes, image_size=size, overrides=overrides)


def _identify_resmlp(tensors: Tensors, layout: layouts.Layout, what: str) -> ModelInfo:
    classes = _shape(tensors, layout.key("head.weight"), 2, what)[0]
    dim, _, _, patch = _shape(tensors, layout.key("stem.proj.weight"), 4, what)
    tokens = _shape(tensors, layout.key("blocks.0.linear_tokens.weight"), 2, what)[0]
    traits = {"embed_dim": dim, "depth": depth_of(tensors, layout), "patch_size": patch}
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise InputError(
            f"{what}: its linear layers over {tokens} patches are of no square grid; only square "
            "images are supported"
        )
    for name in registry.list_models("resmlp*"):
        if traits.items() <= registry.model_options(name).items():
            return registry.model_info(name, num_classes=classes, image_size=side * patch)
    found = ", ".join(f"{key} {value}" for key, value in traits.items())
    raise InputError(f"{what}: no registered ResMLP has {found}")


def _identify_regnet(tensors: Tensors, layout: layouts.Layout, what: str) -> ModelInfo:
    classes = _shape(tensors, layout.key("head.fc.weight"), 2, what)[0]
    for name in registry.list_models("regnety*"):
        if _is_regnet(tensors, layout, registry.model_options(name)):
            return registry.model_info(name, num_classes=classes)
    widths = [
        tensors[key].shape[0]
        for stage in range(1, 5)
        if (key := layout.key(f"s{stage}.b1.conv1.conv.weight")) in tensors
    ]
    raise InputError(f"{what}: no registered RegNetY has stages of these widths: {widths}")


def _is_regnet(tensors: Tensors, layout: layouts.Layout, options: dict[str, Any]) -> bool:
    """Tells whether the widths, depths and groups of all stages are the model's."""
    plan = stage_plan(*(options[key] for key in ("w0", "wa", "wm", "group_width", "depth")))
    for stage, (width, groups, blocks) in enumerate(plan, start=1):
        last = layout.key(f"s{stage}.b{blocks}.conv2.conv.weight")
        after = layout.key(f"s{stage}.b{blocks + 1}.conv2.conv.weight")
        if after in tensors or last not in tensors:
            return False
        if tensors[last].shape[:2] != (width, width // groups):
            return False
    return layout.key(f"s{len(plan) + 1}.b1.conv2.conv.weight") not in tensors
