"""Finds the tensors of one model in what training programs save: containers, wrappers, averages.

Known: the reference and timm (`model`, `model_ema`, `state_dict`, `state_dict_ema`), torchvision's
references (`model_ema` with `n_averaged`), Lightning (`state_dict` of a whole module, metrics and
all; with weight averaging `current_model_state` beside it), DistributedDataParallel (`module.`),
torch.compile (`_orig_mod.`), and whatever a program calls its model, one in the other.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from deit_jax.convert import layouts
from deit_jax.errors import InputError

# timm's keys that only one layout of a family can have as its own.
MARKS = {
    "vit": ("cls_token", "blocks.0.attn.qkv.weight"),
    "parallel": ("cls_token", "blocks.0.attns.1.attn.qkv.weight"),
    "cait": ("cls_token", "blocks_token_only.0.attn.q.weight"),
    "resmlp": ("norm.weight", "blocks.0.linear_tokens.weight"),
    "regnet": ("stem.conv.weight",),
}

_MODELS = {
    "raw": (
        *("current_model_state", "model", "state_dict", "model_state_dict", "model_state"),
        *("net", "network", "module"),
    ),
    "ema": ("model_ema", "state_dict_ema", "model_ema_state_dict", "ema_state_dict", "ema"),
}
_AVERAGE = re.compile(r"(?:^|[._])(?:ema|swa|averaged?)(?:[._]|$)")
_TEACHER = re.compile(r"(?:^|[._])teacher(?:[._]|$)")
_HEADS = {"head", "head_dist", "classifier", "cls_classifier", "distillation_classifier", "fc"}


def state_dict(
    content: Mapping[Any, Any], weights: str, what: str, notes: list[str]
) -> tuple[Mapping[Any, Any], bool]:
    """Finds the state dict inside what `torch.load` returned.

    Args:
      content: a state dict, or a training checkpoint with one.
      weights: "raw" or "ema".
      what: names the file.
      notes: gets a line where the file holds an EMA besides.

    Returns:
      The state dict, and whether it is an EMA by the name of its container.

    Raises:
      InputError: it holds a whole model as an object.
    """
    names = dict(_MODELS)
    if "current_model_state" in content:  # Lightning's weight averaging keeps the average there
        names["ema"] = ("state_dict",)
    found = {
        kind: next((name for name in these if _is_dict(content.get(name))), None)
        for kind, these in names.items()
    }
    taken, other = found[weights] or found["raw"], found["ema"]
    if taken is None:
        return content, False
    if found["raw"] and other:
        left = other if taken == found["raw"] else found["raw"]
        option = f"--weights={'ema' if left == other else 'raw'} takes {left!r}"
        notes.append(f"the file holds {taken!r} and {left!r}: {taken!r} is taken; {option}")
    inner = content[taken]
    while deeper := next((name for name in names["raw"] if _is_dict(inner.get(name))), None):
        inner = inner[deeper]
    if not inner:
        raise InputError(
            f"{what}: {taken!r} in it is an object ({type(content[taken]).__name__}) or empty, not "
            "a state dict; save the model's state_dict()"
        )
    return inner, taken == other


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)


def select(
    names: Iterable[str], weights: str, what: str, notes: list[str], *, chosen: bool = False
) -> dict[str, str]:
    """Chooses the tensors of one model among those of a state dict.

    Args:
      names: of all tensors.
      weights: "raw" or "ema".
      what: names the file.
      notes: gets a line about what is left out.
      chosen: the state dict is the wanted one of raw and EMA; else names such as `ema_model.` tell.

    Returns:
      The key in the file by the name without its wrappers; all as they are, without a known model.

    Raises:
      InputError: there is no EMA, or nothing but one, or several models.
    """
    names = list(names)
    keys = {layout.key(MARKS[layout.family][0]) for layout in layouts.ALL}
    pattern = re.compile(r"(?:|.*\.)(?=(?:" + "|".join(map(re.escape, sorted(keys))) + r")$)")
    prefixes = found = {match[0] for match in map(pattern.match, names) if match}
    averages = {prefix for prefix in prefixes if _AVERAGE.search(prefix)}
    if weights == "ema" and not chosen and not averages:
        starts = sorted({name.partition(".")[0] for name in names})[:6]
        raise InputError(f"{what}: no EMA in it; its names begin with {', '.join(starts)}")
    if not chosen and averages and weights == "raw" and prefixes == averages:
        raise InputError(f"{what}: holds an EMA alone; take it by --weights=ema")
    if averages and not chosen:
        other = "raw" if weights == "ema" else "ema"
        if averages != prefixes:
            notes.append(f"the file holds weights and their EMA; --weights={other} takes the other")
        prefixes = averages if weights == "ema" else prefixes - averages
    students = {prefix for prefix in prefixes if not _TEACHER.search(prefix)}
    prefixes = students or prefixes
    if not prefixes or "" in prefixes:
        return {name: name for name in names}
    if len(prefixes) > 1:
        raise InputError(
            f"{what}: holds several models, whose names begin with {', '.join(sorted(prefixes))}; "
            "save the state_dict() of one"
        )
    (prefix,) = prefixes
    taken = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    # A program may keep the head beside what it calls the backbone.
    around = prefix.rstrip(".").rpartition(".")[0]
    around = f"{around}." if around else ""
    for name in names:
        inner = name.removeprefix(around)
        if name.startswith(around) and inner.partition(".")[0] in _HEADS:
            taken.setdefault(inner, name)
    others = tuple(sorted(found - {prefix}))  # of them, no tensor is named alone
    own = {*taken.values()}
    left = [name for name in names if name not in own and not name.startswith(others)]
    left = [*left[:3], *(["…"] if len(left) > 3 else []), *(f"all of {other}" for other in others)]
    if left:
        notes.append(f"beside the model's tensors are left out: {', '.join(left)}")
    return taken
