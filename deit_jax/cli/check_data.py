"""Reads and decodes every image of a recipe's data set, before a long run does.

deit-jax check-data --config=deit_b_distill --config.dataset.root=ROOT
deit-jax check-data --config=folder --config.dataset.root=ROOT --workers 16 --json > report.json

Prints what the training and the evaluation split hold: classes in their order, images a class,
sizes, colours. An image that training's decoder refuses, one so long and narrow that the run could
not resize it, and a label outside the classes, are named on a line each, and the exit status is
then 1. Files that are in both splits are a warning. Files that do not count as images are named by
their kind; --json names all.
"""

import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from deit_jax.cli.arguments import one_or_more
from deit_jax.console import escaped
from deit_jax.folders import printable
from deit_jax.parallel import cpus

RECIPE = "required"
SPLITS = ("train", "eval")
NAMED = 8  # so many names of a long list are printed


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the flags."""
    parser.add_argument(
        "--workers",
        type=one_or_more,
        default=cpus.available(),
        metavar="N",
        help="images decoded at a time (default: one per processor)",
    )


def run(arguments: Namespace, emit: Callable[[object], None]) -> int:
    """Checks and reports; returns 1 where some images cannot be used, else 0."""
    from deit_jax import data
    from deit_jax.data import scan, transforms
    from deit_jax.models import imagenet
    from deit_jax.training.complete import complete

    config = complete(arguments.config)
    size = config.input.image_size
    sources = {split: data.open_source(config.dataset, split) for split in SPLITS}
    for split, source in sources.items():
        names = [" ".join(dict.fromkeys((n, imagenet.readable(n)))) for n in source.class_names]
        names = [escaped(name, one_line=True) for name in names]
        _say(f"{split}: {source.description}, {source.num_examples:,} images")
        _say(f"  {source.num_classes} classes: {_some(names) or 'without names'}")
        if source.num_classes == 1:
            _say("  warning: of one class there is nothing to learn; check config.dataset.root")
        for note in source.notes:
            _say(f"  note: {escaped(note, one_line=True)}")
        for reason, passed in source.passed_over.items():
            _say(f"  not data, {len(passed):,} {reason}: {_some(list(map(printable, passed)))}")
    begin = time.perf_counter()
    splits, tables = {}, {}
    for split, source in sources.items():
        with tqdm(total=source.num_examples, desc=split, unit="image") as bar:

            def seen(problem: dict[str, str] | None, bar: tqdm = bar) -> None:
                if problem:
                    _say(escaped(f"{problem['name']}: {problem['reason']}", one_line=True))
                bar.update()

            splits[split], tables[split] = scan.survey(
                source,
                image_size=size,
                short=transforms.short_side(config.input, split, image_size=size),
                workers=arguments.workers,
                seen=seen,
            )
    seconds = time.perf_counter() - begin
    twice = scan.in_both(sources, tables)
    for split, report in splits.items():
        _say(_summary(split, report, size))
    if twice:
        pairs = [f"{pair['eval']} = {pair['train']}" for pair in twice]
        _say(f"warning: eval images that are also in train, {len(twice):,}: {_some(pairs)}")
    images = sum(report["images"] for report in splits.values())
    bad = sum(len(report["problems"]) for report in splits.values())
    verdict = f"{bad:,} of {images:,} images cannot be used" if bad else "every image can be used"
    _say(f"{verdict}; {seconds:.1f} s, {images / seconds:,.0f} images/s")
    emit({"ok": not bad, "splits": splits, "in_both": twice, "seconds": round(seconds, 3)})
    return 1 if bad else 0


def _summary(split: str, report: dict[str, Any], image_size: int) -> str:
    usable = report["images"] - len(report["problems"])
    lines = [f"{split}: {usable:,} of {report['images']:,} images usable (min / median / max)"]
    for name in ("images_per_class", "height", "width", "aspect"):
        spread = " / ".join(f"{v:g}" for v in (report[name] or {}).values()) or "none"
        lines.append(f"  {name:18}{spread}")
    lines.append(f"  {'smaller':18}{report['smaller']:,} with a side below {image_size} pixels")
    if report["colours"]:
        colours = ", ".join(f"{count:,} {name}" for name, count in report["colours"].items())
        lines.append(f"  {'colours':18}{colours}")
    if report["repeated"]:
        lines.append(f"  {'repeated':18}{report['repeated']:,} copies of others in this split")
    if empty := report["empty_classes"]:
        classes = f"{len(empty):,} of {len(report['classes']):,} classes"
        lines.append(f"  warning: {classes} without usable images: {_some(empty)}")
    return "\n".join(lines)


def _some(names: Sequence[str]) -> str:
    """The first and last of many names, or all of a few."""
    if len(names) <= NAMED:
        return ", ".join(names)
    return f"{', '.join(names[:3])} … {', '.join(names[-3:])}"


def _say(text: str) -> None:
    """Writes to stdout above the progress bar, a name with odd characters too on its one line."""
    tqdm.write(escaped(text), file=sys.stdout)
    sys.stdout.flush()
