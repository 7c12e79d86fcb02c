"""Finds out whose tensors a file holds, and in whose names: from keys and shapes alone."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from deit_jax.convert import layouts, wrappers
from deit_jax.errors import InputError
from deit_jax.models import hmlp as hmlp_stem
from deit_jax.models import registry
from deit_jax.models.info import ModelInfo
from deit_jax.models.regnet import stage_plan

Tensors = Mapping[str, np.ndarray]
# A tensor of the first block of which each block has one.
_FIRST = {
    "parallel": "blocks.0.attns.1.attn.qkv.weight",
    "resmlp": "blocks.0.linear_tokens.weight",
    "regnet": "s1.b1.conv1.conv.weight",
}

_PLAIN = {  # what a family without these options is
    **{"distilled": False, "pos_embed": True, "rope": "none", "num_registers": 0, "norm": "layer"},
    **{"qk_norm": False, "qkv_bias": True, "hmlp": False},
}


def layout_of(tensors: Tensors, what: str) -> layouts.Layout:
    """Returns the layout in whose names the tensors are.

    Raises:
      InputError: no layout fits; names the file `what`.
    """
    for layout in layouts.ALL:
        marks = [layout.key(mark) for mark in wrappers.MARKS[layout.family]]
        if layout in (layouts.REFERENCE, layouts.TIMM_ROPE):  # as timm's but for LayerScale
            marks.append("blocks.0.gamma_1")
        if layout is layouts.TIMM_ROPE:  # without frequencies it is as the reference
            marks.append("rope.freqs")
        if all(mark in tensors for mark in marks):
            return layout
    some = ", ".join(list(tensors)[:4]) or "nothing"
    raise InputError(
        f"{what}: not recognised as DeiT, DeiT III, RoPE-ViT, ViT-5, CaiT, ResMLP or RegNetY in "
        "the names of the reference, timm, Hugging Face or torchvision; "
        f"{len(tensors)} tensors, such as {some}"
    )


def identify(
    tensors: Tensors, layout: layouts.Layout, *, what: str, model: str | None = None
) -> ModelInfo:
    """Describes the registered model of the tensors' structure; of several, the nearest in size.

    No tensor tells DeiT III from RoPE-ViT (axial) with learned positions besides: it is DeiT III
    unless `model` has the rotation.

    Args:
      tensors: of a file in `layout`.
      layout: as `layout_of` found it.
      what: names the file in errors.
      model: a registered name that the source or the user gives.

    Raises:
      InputError: no registered model has this structure; says what was found.
    """
    if layout.family == "regnet":
        return _identify_regnet(tensors, layout, what)
    if layout.family == "resmlp":
        return _identify_resmlp(tensors, layout, what)
    return _identify_vit(tensors, layout, what, model)


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


def ambiguous(info: ModelInfo, layout: layouts.Layout, model: str | None) -> list[str]:
    """Returns a note where tensors as those of `info` may be of another model, else nothing."""
    if model is not None or layout is not layouts.REFERENCE:
        return []
    own = _options(info.name)
    alike = {**own, "rope": "axial"}
    visible = ("embed_dim", "depth", "rope", "pos_embed", "layer_scale", "distilled")
    others = [
        name
        for name in registry.names_of()
        if all(_options(name).get(key, "none here") == alike[key] for key in visible)
    ]
    if own["rope"] != "none" or not others:
        return []
    other = f"if it is {others[0]}, whose tensors look the same, say so by --model"
    return [f"taken to be {info.name}; {other}"]


def _identify_vit(
    tensors: Tensors, layout: layouts.Layout, what: str, model: str | None
) -> ModelInfo:
    def holds(timm_key: str) -> bool:
        return layout.key(timm_key) in tensors

    classes = _shape(tensors, layout.key("head.weight"), 2, what)[0]
    hmlp = holds("patch_embed.proj.0.weight")
    stem = layout.key("patch_embed.proj.weight")
    patch = hmlp_stem.PATCH if hmlp else _shape(tensors, stem, 4, what)[2]
    two_paths = layout.family == "parallel"
    attn = "blocks.0.attns.0.attn" if two_paths else "blocks.0.attn"
    norm, scale = ("attns.0.norm", "attns.0.ls") if two_paths else ("norm1", "ls1")
    traits = {
        "embed_dim": _shape(tensors, layout.key("cls_token"), 3, what)[2],
        "depth": depth_of(tensors, layout),
        "distilled": holds("dist_token"),
        "layer_scale": holds(f"blocks.0.{scale}.gamma"),
        "pos_embed": holds("pos_embed"),
        "hmlp": hmlp,
        "learned_rope": holds("rope.freqs"),
        "num_registers": _shape(tensors, "reg_token", 3, what)[1] if holds("reg_token") else 0,
        "norm": "layer" if holds(f"blocks.0.{norm}.bias") else "rms",
        "qk_norm": holds(f"{attn}.q_norm.weight"),
        "qkv_bias": holds(f"{attn}.qkv.bias"),
    }
    tokens = 1 + traits["distilled"]
    grid, prefix = _side(tensors, layout, tokens, what)
    if traits["pos_embed"]:
        traits["no_embed_class"] = prefix == 0
    size = grid * patch
    preferred = _options(model).get("rope") if model else "none"
    candidates = []
    for name in registry.names_of():
        options = _options(name)
        if registry.family(name) != layout.family:
            continue
        if all(options.get(key) == value for key, value in traits.items()):
            distance = abs(options["image_size"] - (size or options["image_size"]))
            unlike = options["rope"] != preferred, options["patch_size"] != patch
            candidates.append((*unlike, distance, name))
    if not candidates:
        found = ", ".join(f"{key} {value}" for key, value in traits.items())
        raise InputError(f"{what}: no registered model has {found}")
    _, other_patch, _, name = min(candidates)
    return registry.model_info(
        name,
        num_classes=classes,
        **({"image_size": size} if size else {}),
        overrides=(("patch_size", patch),) if other_patch else (),
    )


def _options(name: str) -> dict[str, Any]:
    options = _PLAIN | registry.options(registry.model_info(name))
    options.setdefault("no_embed_class", registry.family(name) == "cait")
    options["layer_scale"] = options.get("layer_scale_init") is not None
    options["learned_rope"] = options.get("rope") == "mixed"
    return options


def _side(tensors: Tensors, layout: layouts.Layout, tokens: int, what: str) -> tuple[int, int]:
    """Returns the number of patches along a side, and of tokens with positions before them.

    (0, 0) where no tensor tells. Positions that make a square are of patches alone.
    """
    if (key := layout.key("pos_embed")) in tensors:
        positions = _shape(tensors, key, 3, what)[1]
    elif "freqs_t_x" in tensors:  # a buffer of the reference (`buffers`)
        positions = _shape(tensors, "freqs_t_x", 1, what)[0]
    else:
        return 0, 0
    prefix = 0 if math.isqrt(positions) ** 2 == positions else tokens
    side = math.isqrt(max(positions - prefix, 0))
    if side == 0 or side * side + prefix != positions:
        raise InputError(
            f"{what}: {positions} position embeddings, {prefix} of them for prefix tokens, make no "
            "square grid; only square images are supported"
        )
    return side, prefix


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
    for name in registry.names_of("resmlp*"):
        if traits.items() <= registry.model_options(name).items():
            return registry.model_info(name, num_classes=classes, image_size=side * patch)
    found = ", ".join(f"{key} {value}" for key, value in traits.items())
    raise InputError(f"{what}: no registered ResMLP has {found}")


def _identify_regnet(tensors: Tensors, layout: layouts.Layout, what: str) -> ModelInfo:
    classes = _shape(tensors, layout.key("head.fc.weight"), 2, what)[0]
    for name in registry.names_of("regnety*"):
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
