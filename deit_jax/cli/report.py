"""Reports how good a model is on a data set, as one HTML page and as JSON.

deit-jax report --model runs/mine --data ROOT --out report.html
deit-jax report --model runs/mine --data ROOT --split train --out train.html
deit-jax report --model runs/digits --config=digits --out report.html

The page has the accuracy, also of each class; the confusion matrix; the calibration with its error
(ECE); and the worst mistakes as pictures, those first in which the model was surest of another
class: some of them are mistakes of the labels. It needs no other file and no network. All figures
are in the JSON file of the same name beside it, too.

ROOT is a folder as in `--config=folder`: ROOT/val/CLASS/..., or one that a recipe describes.
Images are prepared as for the model's evaluation. The data's classes may be some of the model's,
by name. Images that cannot be read are named and left out, and the exit status is then 1.
"""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict
from tqdm import tqdm

from deit_jax import storage
from deit_jax.cli import report_page
from deit_jax.cli.arguments import new_file, one_or_more
from deit_jax.config.files import load_config
from deit_jax.config.validate import validate
from deit_jax.console import escaped, log, log_error
from deit_jax.errors import InputError
from deit_jax.folders import normalise, printable
from deit_jax.inference import quality

if TYPE_CHECKING:  # which imports TensorFlow
    from deit_jax.data import Source
    from deit_jax.models.info import ModelInfo

RECIPE = "optional"
_OWN = {"model", "data", "confusion", "calibration", "mistakes"}  # fields of every report


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the flags."""
    add = parser.add_argument
    add("--model", required=True, help="model or run folder, PyTorch file, URL or hf:OWNER/NAME")
    add("--data", metavar="ROOT", help="folder of images, if no --config says where they are")
    add("--out", required=True, type=new_file, metavar="HTML", help="file to write")
    add("--split", choices=("train", "eval"), default="eval", help="(default: eval)")
    add("--worst", type=one_or_more, default=32, help="mistakes to show, at most (default: 32)")
    add("--batch_size", type=one_or_more, default=64, help="pictures at once (default: 64)")


def run(arguments: Namespace, emit: Callable[[object], None]) -> int:
    """Reports; returns 1 where some images could not be read, else 0."""
    if arguments.out.suffix.lower() != ".html":
        raise InputError(f"--out is {arguments.out}, expected a name that ends in .html")
    beside = arguments.out.with_suffix(".json")
    _check_beside(beside)
    if arguments.data is None and arguments.config is None:
        raise InputError("name the data: --data=ROOT or --config=RECIPE")
    if arguments.data is not None and arguments.config is not None:
        raise InputError("name the data by --data=ROOT or by a --config, not by both")
    from deit_jax import data
    from deit_jax.convert.load import load_model

    model = load_model(arguments.model)
    config = _prepared(arguments.config or _folder(arguments.data), model.info)
    source = data.open_source(config.dataset, arguments.split)
    for note in source.notes:
        log(f"note: {note}")
    classes = _classes_of(model.info, source)
    plan = data.InputPlan(
        input=FrozenConfigDict(config.input),
        image_size=config.input.image_size,
        batch_size=min(arguments.batch_size, source.num_examples),
        steps_per_epoch=0,
        seed=0,
        group_size=1,
    )
    batches = data.eval_batches(source, plan)
    with tqdm(total=source.num_examples, unit="image") as bar:
        outcomes, heads, worst = _assess(model, batches, classes, arguments.worst, bar)
    for name, reason in batches.skipped.items():
        log_error(escaped(f"{name}: {reason}", one_line=True))
    names = model.info.class_names or source.class_names
    report = {
        "model": {"name": model.info.name, "from": arguments.model, "source": model.info.source},
        "data": {"description": source.description, "split": arguments.split},
        **quality.totals(outcomes),
        **heads,
        "left_out": batches.skipped,
        "class_names": list(names) or [f"class {i}" for i in range(model.info.num_classes)],
        "confusion": quality.confusion(outcomes),
        "calibration": quality.calibration(outcomes),
        "mistakes": [{"example": source.example_id(one.index)} | one.facts for one in worst],
    }
    page = report_page.page(report, [one.pixels for one in worst])
    storage.replace_text(beside, json.dumps(report, indent=1) + "\n")
    storage.replace_text(arguments.out, page)
    log(
        f"{arguments.out}: top-1 {report['top1']:.2f} % of {report['num_examples']:,} images, "
        f"ECE {report['calibration']['ece']:.2f} %; figures in {beside}"
    )
    short = {name: report[name] for name in ("top1", "top5", "loss", "num_examples")}
    emit({"out": str(arguments.out), "ece": report["calibration"]["ece"], **short})
    return 1 if batches.skipped else 0


def _check_beside(file: storage.Path) -> None:
    """Raises InputError where the JSON file would take the place of another than of a report."""
    if not storage.exists(file):
        return
    try:
        known = storage.parse_json(storage.read_bytes(file))
    except (OSError, ValueError):
        known = None
    if not isinstance(known, dict) or not set(known) >= _OWN:
        raise InputError(
            f"--out: the report's figures would overwrite {file}, which is no report; name another "
            "file"
        )


def _folder(root: str) -> ConfigDict:
    config = load_config("folder:plain")
    config.dataset.root = root
    return config


def _prepared(config: ConfigDict, info: "ModelInfo") -> ConfigDict:
    """The config with the preprocessing of the model."""
    config = config.copy_and_resolve_references()
    config.input.image_size = info.side
    config.input.interpolation = info.interpolation
    config.input.on_bad_image = "skip"
    config.input.train_crop = "small" if info.crop_ratio is None else "random_resized"
    config.input.crop_ratio = info.crop_ratio or config.input.crop_ratio
    validate(config)
    return config


def _classes_of(info: "ModelInfo", source: "Source") -> np.ndarray:
    """The model's class of each label of the data.

    Raises:
      InputError: the classes are others, or it cannot be known.
    """
    where = printable(source.description)
    if not info.num_classes:
        raise InputError(f"this {info.name} has no classes to report on, only features")
    if info.class_names and source.class_names:
        place = {normalise(name): number for number, name in enumerate(info.class_names)}
        unknown = [name for name in source.class_names if normalise(name) not in place]
        if unknown:
            raise InputError(
                f"{where}: {len(unknown)} of its {source.num_classes} classes are none of the "
                f"model's {info.num_classes}, first {unknown[0]!r}, expected names such as "
                f"{info.class_names[0]!r}; take the data or the model that belongs to it"
            )
        return np.array([place[normalise(name)] for name in source.class_names])
    if source.num_classes != info.num_classes:
        raise InputError(
            f"{where} has {source.num_classes} classes, but the model {info.num_classes}, and "
            "without names on both sides none can be matched"
        )
    return np.arange(info.num_classes)


class _Mistake(NamedTuple):
    surety: float  # how much more probable the predicted class was than the label
    index: int
    pixels: np.ndarray
    facts: dict[str, Any]


def _assess(
    model: Any, batches: Iterator[dict], classes: np.ndarray, most: int, bar: tqdm
) -> tuple[quality.Outcomes, dict[str, float], list[_Mistake]]:
    """What becomes of all images; the top-1 of each head, of several; and the worst mistakes."""
    parts, hits, worst, first = [], [], [], 0
    for batch, heads in _logits(model, batches):
        rows = np.flatnonzero(batch["mask"])
        label, heads = classes[batch["label"][rows]], [head[rows] for head in heads]
        if not all(np.isfinite(head).all() for head in heads):
            raise InputError("the logits are not finite; have these weights diverged?")
        outcomes = quality.Outcomes.of(sum(heads) / len(heads), label)
        parts.append(outcomes)
        hits.append([(head.argmax(-1) == label).sum() for head in heads])
        for at in np.flatnonzero(~outcomes.correct):
            facts = {
                "label": int(label[at]),
                "predicted": int(outcomes.predicted[at]),
                "confidence": float(outcomes.confidence[at]),
                "probability_of_label": float(outcomes.of_label[at]),
            }
            surety = facts["confidence"] - facts["probability_of_label"]
            worst.append(_Mistake(surety, first + rows[at], batch["image"][rows[at]], facts))
        worst = sorted(worst, key=lambda one: (-one.surety, one.index))[:most]
        first += len(batch["mask"])
        bar.update(len(rows))
    shares = 100 * np.sum(hits, axis=0) / sum(len(part.label) for part in parts)
    names = ("top1_cls", "top1_dist") if len(shares) > 1 else ()
    return quality.Outcomes.joined(parts), dict(zip(names, shares.tolist(), strict=False)), worst


def _logits(model: Any, batches: Iterator[dict]) -> Iterator[tuple[dict, list[np.ndarray]]]:
    """Yields each batch and the logits of each head."""
    import jax

    from deit_jax.models.network import split_model
    from deit_jax.training.mixing import normalize

    network, variables = split_model(model)
    info = model.info

    @jax.jit
    def forward(variables: Any, images: jax.Array) -> tuple[jax.Array, ...]:
        return network(variables, normalize(images, info.mean, info.std))[0]

    for batch in batches:
        yield batch, [np.asarray(head) for head in forward(variables, batch["image"])]
