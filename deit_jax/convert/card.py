"""Writes a model card: what `model.json` and the run beside it say, as the hub's README.md."""

import json
import re
from typing import Any

import numpy as np

from deit_jax import storage
from deit_jax.console import escaped
from deit_jax.errors import InputError, brief
from deit_jax.models import imagenet, registry
from deit_jax.models.info import ModelInfo

LICENCE_MISSING = "fill-in-the-licence"
_LIBRARIES = {"timm": "timm", "hf": "transformers"}
_METRICS = {
    "top1": "top-1 accuracy, %",
    "top5": "top-5 accuracy, %",
    "top1_cls": "top-1 accuracy of the class head alone, %",
    "top1_dist": "top-1 accuracy of the distillation head alone, %",
    "loss": "cross-entropy",
    "num_examples": "images",
    "teacher_top1": "for comparison: top-1 accuracy of the teacher, %",
}
_RECIPE = ("dataset", "input", "mixing", "distill", "optimizer", "schedule", "train", "init_from")
_SHOWN_CLASSES = 20


def text(
    model: storage.Path, info: ModelInfo, parameters: int, layout: str, repo: str, licence: str
) -> str:
    """Returns the card.

    Args:
      model: the model folder; config.json and metrics.jsonl of its run lie beside it.
      info: of the model.
      parameters: their number.
      layout: "timm" or "hf".
      repo: OWNER/NAME, as far as it is known.
      licence: of the weights, as the hub names licences; "" leaves a placeholder.

    Raises:
      InputError: the run's files are damaged.
    """
    described = {"license": licence} if licence else {"license": "other"}
    if not licence:
        described["license_name"] = LICENCE_MISSING
    described |= {"library_name": _LIBRARIES[layout], "pipeline_tag": "image-classification"}
    described["tags"] = ["image-classification", "deit-jax"]
    # JSON is YAML: a name cannot break out of its place.
    front = "\n".join(f"{name}: {json.dumps(value)}" for name, value in described.items())
    name = repo.rpartition("/")[2]
    title = f"# {name}\n\n{info.name}: {parameters:,} parameters, images of {info.side}×{info.side}"
    title += f" pixels, {info.num_classes:,} classes. Trained or converted with deit-jax."
    parts = [f"---\n{front}\n---", title]
    if not licence:
        parts.append(
            "> **Licence: to be filled in.** Name it here and in the first lines of this file "
            "(`license`), after those of the data and of the weights that training began with."
        )
    distilled = registry.is_distilled(info.name, dict(info.overrides))
    kind = ("DeiT", "WithTeacher") if distilled else ("ViT", "")
    use = _USE[layout].format(repo=repo, model=f"{kind[0]}ForImageClassification{kind[1]}")
    parts += ["## Use", use, "## Images", _images(info), "## Evaluation", _evaluation(model, info)]
    parts += ["## Data and recipe", _recipe(model, info)]
    return "\n\n".join(parts) + "\n"


_USE = {
    "timm": """```python
import timm

model = timm.create_model("hf-hub:{repo}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

In JAX: `deit_jax.load_model("hf:{repo}")`.""",
    "hf": """```python
from transformers import AutoImageProcessor, {model}

processor = AutoImageProcessor.from_pretrained("{repo}")
model = {model}.from_pretrained("{repo}").eval()
```

In JAX: `deit_jax.load_model("hf:{repo}")`.""",
}


def _images(info: ModelInfo) -> str:
    size = info.side
    crop = f"the whole image is resized to {size}×{size}"
    if info.crop_ratio is not None:
        short = int(size / info.crop_ratio)
        crop = f"the short side is resized to {short}, and the centre {size}×{size} cut out"
    mean, std = (", ".join(f"{x:g}" for x in values) for values in (info.mean, info.std))
    classes = [_cell(imagenet.readable(name)) for name in info.class_names[:_SHOWN_CLASSES]]
    more = ", ..." * (len(info.class_names) > _SHOWN_CLASSES)
    names = f"Classes: {', '.join(classes)}{more}." if classes else "The classes have no names."
    return (
        f"RGB; {crop} ({info.interpolation}); of pixels from 0 to 1, mean {mean} and standard "
        f"deviation {std}.\n\n{names}"
    )


def _evaluation(model: storage.Path, info: ModelInfo) -> str:
    record, where = _record(model, info)
    rows = [(words, record[name]) for name, words in _METRICS.items() if name in record]
    if not rows:
        return "> **To be filled in:** no report of a run lies beside the model."
    table = "\n".join(f"| {words} | {_number(value)} |" for words, value in rows)
    both = registry.is_distilled(info.name, dict(info.overrides))
    note = "The prediction is that of the mean of both heads' logits.\n\n" * both
    return f"{note}On the evaluation images of the run, {where}:\n\n| | |\n|---|---|\n{table}"


def _record(model: storage.Path, info: ModelInfo) -> tuple[dict[str, Any], str]:
    """Returns the evaluation of these weights, and when it was; {} where no run says it."""
    file = model.parent / "metrics.jsonl"
    if not file.is_file():
        return {}, ""
    try:
        records = [storage.parse_json(line) for line in file.read_bytes().splitlines()]
        kinds = ("eval", "final")
        found = [record for record in records if record.get("split") in kinds]
        if not found:
            return {}, ""
        # The folder `best` has the weights of the first evaluation that none surpassed.
        best = model.name == "best"
        record = max(found, key=lambda record: record["top1"]) if best else found[-1]
        if info.weights == "ema":
            ema = {n[4:]: x for n, x in record.items() if n.startswith("ema_")}
            same = {n: record[n] for n in ("num_examples", "teacher_top1") if n in record}
            return ema | same, f"the EMA at step {record['step']:,}"
        return record, f"at step {record['step']:,}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is damaged ({brief(error)}); remove it, or mend it") from error


def _recipe(model: storage.Path, info: ModelInfo) -> str:
    source = f"Source: {_cell(info.source)}.\n\n" if info.source else ""
    file = model.parent / "config.json"
    if not file.is_file():
        return f"{source}> **To be filled in:** no configuration of a run lies beside the model."
    try:
        config = storage.parse_json(file.read_bytes())
        chosen = {name: config[name] for name in _RECIPE if name in config}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{file} is damaged ({brief(error)}); take another copy of it") from error
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in _leaves("", chosen))
    return f"{source}| field of the run's configuration | value |\n|---|---|\n{rows}"


def _leaves(name: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        inner = [_leaves(f"{name}.{key}".strip("."), x) for key, x in value.items()]
        return [leaf for leaves in inner for leaf in leaves]
    return [] if value in ("", None) else [(name, value)]


def _cell(value: Any) -> str:
    """Returns a value as the cell of a table; of a path its last part, which is of no machine."""
    shown = str(value)
    if "://" in shown or shown.startswith(("/", "~", ".")):
        shown = shown.rstrip("/").rpartition("/")[2]
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", escaped(shown, one_line=True))


def _number(value: Any) -> str:
    whole = float(value).is_integer()
    return f"{int(value):,}" if whole else f"{np.float64(value):.4g}"
