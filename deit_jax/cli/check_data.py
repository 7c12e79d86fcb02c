"""Reads and decodes every image of a recipe's data set, before a long run does.

python tools/data_check.py --config=configs/deit_b_distill.py --config.dataset.root=ROOT
python tools/data_check.py --config=configs/folder.py --config.dataset.root=ROOT \\
    --workers 16 --json report.json

Prints what the training and the evaluation split hold: classes in their order, images a class,
sizes, colours. An image that training's decoder refuses, and a label outside the classes, are named
on a line each, and the exit status is then 1. Files that are in both splits are a warning. --json
writes all of it for programs. A mistake ends in one line and exit status 2.
"""

import collections
import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from deit_jax.config.flags import Parser, parse
from deit_jax.config.validate import validate
from deit_jax.errors import InputError, exit_status
from deit_jax.models import imagenet

SPLITS = ("train", "eval")
NAMED = 8  # so many names of a long list are printed
COLUMNS = [("index", "i8"), ("label", "i8"), ("height", "i4"), ("width", "i4"), ("hash", "i8")]

Report = dict[str, Any]  # what --json writes, of a split or of all


def main(argv: list[str] | None = None) -> int:
    """Checks; returns the exit status."""
    return exit_status(lambda: _run(_arguments(sys.argv[1:] if argv is None else argv)))


def _arguments(argv: list[str]) -> Namespace:
    usage = "%(prog)s --config=FILE [--config.GROUP.FIELD=VALUE ...] [options]"
    parser = Parser(__doc__, usage)
    add = parser.add_argument
    add("--workers", type=int, help="images decoded at a time (default: one a processor)")
    add("--json", type=Path, metavar="FILE", help="also write the report")
    arguments = parse(parser, argv)
    if arguments.config is None:
        raise InputError("--config is missing; name a recipe, such as configs/digits.py")
    if arguments.workers is None:
        arguments.workers = os.cpu_count() or 1
    if arguments.workers < 1:
        raise InputError(f"--workers is {arguments.workers}, expected 1 or more")
    if arguments.json and not os.access(arguments.json.absolute().parent, os.W_OK):
        raise InputError(f"--json {arguments.json}: its folder is missing or cannot be written to")
    if arguments.json and arguments.json.is_dir():
        raise InputError(f"--json {arguments.json} is a folder, expected the file to write")
    return arguments


def _run(arguments: Namespace) -> int:
    config = arguments.config
    validate(config)

    from deit_jax import data  # TensorFlow: the command line is checked without it

    sources = {split: data.open_source(config.dataset, split) for split in SPLITS}
    for split, source in sources.items():
        _say(f"{split}: {source.description}, {_count(source.num_examples, 'image')}")
        _say(f"  {source.num_classes} classes{_order(source.class_names)}")
    begin = time.perf_counter()
    splits, tables = {}, {}
    for split, source in sources.items():
        splits[split], tables[split] = check_split(
            split, source, image_size=config.input.image_size, workers=arguments.workers
        )
    seconds = time.perf_counter() - begin
    twice = _in_both(sources, tables)
    for split, report in splits.items():
        _say(_summary(split, report, config.input.image_size))
    if twice:
        shown = ", ".join(f"{pair['eval']} = {pair['train']}" for pair in twice[:NAMED])
        _say(
            f"warning: {_count(len(twice), 'eval image')} also in train: {shown}"
            + (" …" if len(twice) > NAMED else "")
        )
    images = sum(report["images"] for report in splits.values())
    bad = sum(len(report["problems"]) for report in splits.values())
    verdict = f"{bad:,} of {images:,} images cannot be used" if bad else "every image can be used"
    _say(f"{verdict}; {seconds:.1f} s, {images / seconds:,.0f} images/s")
    if arguments.json:
        whole = {"ok": not bad, "splits": splits, "in_both": twice, "seconds": round(seconds, 3)}
        arguments.json.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    return 1 if bad else 0


def check_split(
    split: str, source: Any, *, image_size: int, workers: int
) -> tuple[Report, np.ndarray]:
    """Decodes a split under a progress bar and prints what cannot be used as it is found.

    Args:
      split: its name, for the messages.
      source: deit_jax.data.Source.
      image_size: side that training wants, pixels.
      workers: images decoded at a time.

    Returns:
      The report, and of the usable images a structured array of COLUMNS.
    """
    from deit_jax.data.scan import Unreadable, scan

    table = np.zeros(source.num_examples, COLUMNS)
    colours: collections.Counter[str] = collections.Counter()
    problems, usable = [], 0
    with tqdm(total=source.num_examples, desc=split, unit="image") as bar:
        for example in scan(source, workers=workers):
            reason = None
            if isinstance(example, Unreadable):
                reason = example.reason
            elif not 0 <= example.label < source.num_classes:
                reason = f"label {example.label} is outside the classes 0..{source.num_classes - 1}"
            if reason is None:
                index, label, height, width, colour, fingerprint = example
                table[usable] = (index, label, height, width, fingerprint)
                colours[colour] += 1
                usable += 1
            else:
                problems.append({"name": source.example_id(example.index), "reason": reason})
                _say(f"{problems[-1]['name']}: {reason}")
            bar.update()
    table = table[:usable]
    per_class = np.bincount(table["label"], minlength=source.num_classes)
    names = source.class_names or tuple(map(str, range(source.num_classes)))
    report = {
        "description": source.description,
        "images": source.num_examples,
        "problems": problems,
        "classes": list(names),
        "images_per_class": _spread(per_class),
        "empty_classes": [names[k] for k in np.flatnonzero(per_class == 0)],
        "height": _spread(table["height"]),
        "width": _spread(table["width"]),
        "aspect": _spread(table["width"] / table["height"]),
        "smaller": int((np.minimum(table["height"], table["width"]) < image_size).sum()),
        "colours": {colour: count for colour, count in colours.most_common() if colour},
        "repeated": usable - len(np.unique(table["hash"])),
    }
    return report, table


def _spread(values: np.ndarray) -> dict[str, float] | None:
    """Minimum, median and maximum; None of nothing."""
    if not len(values):
        return None
    least, middle, most = (float(f"{f(values):.4g}") for f in (np.min, np.median, np.max))
    return {"min": least, "median": middle, "max": most}


def _in_both(sources: dict[str, Any], tables: dict[str, np.ndarray]) -> list[dict[str, str]]:
    """The names of every eval image whose bytes a train image has too, and of that one."""
    hashes, first = np.unique(tables["train"]["hash"], return_index=True)
    pairs = []
    for row in tables["eval"][np.isin(tables["eval"]["hash"], hashes)]:
        twin = tables["train"][first[np.searchsorted(hashes, row["hash"])]]
        rows = {"train": twin, "eval": row}
        pairs.append({s: sources[s].example_id(int(rows[s]["index"])) for s in SPLITS})
    return pairs


def _summary(split: str, report: Report, image_size: int) -> str:
    def three(name: str) -> str:
        spread = report[name]
        return " / ".join(f"{v:g}" for v in spread.values()) if spread else "none"

    lines = [
        f"{split}: {report['images'] - len(report['problems']):,} usable of "
        f"{_count(report['images'], 'image')} (below: min / median / max)",
        f"  a class  {three('images_per_class')} images",
        f"  height   {three('height')} pixels",
        f"  width    {three('width')} pixels",
        f"  aspect   {three('aspect')}",
        f"  smaller  {report['smaller']:,} with a side below {image_size}",
    ]
    if report["colours"]:
        colours = ", ".join(f"{count:,} {name}" for name, count in report["colours"].items())
        lines.append(f"  colours  {colours}")
    if report["repeated"]:
        lines.append(f"  repeats  {report['repeated']:,} are copies of others in this split")
    empty = report["empty_classes"]
    if empty:
        dots = " …" if len(empty) > NAMED else ""
        shown = ", ".join(empty[:NAMED])
        classes = f"{len(empty):,} of {len(report['classes']):,} classes"
        lines.append(f"  warning: {classes} without usable images: {shown}{dots}")
    return "\n".join(lines)


def _order(names: Sequence[str]) -> str:
    """The first and last class names, or all of a few."""
    known = []
    for name in names:
        readable = imagenet.readable(name)
        known.append(name if readable == name else f"{name} {readable}")
    if len(known) > NAMED:
        known = [*known[:3], "…", *known[-3:]]
    return f": {', '.join(known)}".replace(", …,", " …") if known else ", without names"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def _say(text: str) -> None:
    """Writes to stdout above the progress bar, a name with odd characters too on its one line."""
    shown = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
    tqdm.write(shown, file=sys.stdout)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be no text
    sys.exit(main())
