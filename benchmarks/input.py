"""Measures what an image costs the input pipeline in CPU time: ours, and PyTorch's beside it.

python tools/benchmark.py input --config=configs/deit_b.py --data ROOT --compare timm --cores 1
python tools/benchmark.py input --config=configs/deit_b.py --data ROOT --only eval --json

ROOT holds {train,val}/CLASS/*.JPEG. Three kinds of preprocessing are measured: the recipe's own for
training, DeiT III's 3-Augment, and evaluation. --compare timm adds PyTorch's pipelines for the
same: timm's loader, and for 3-Augment the reference's chain of torchvision. Their workers deliver
float32, normalised and erased, as in the published runs; or uint8, as ours do, and leave that to
the accelerator.

CPU time is user and system time of a pipeline's process and its workers. It is what a host has to
give, and other programs disturb it less than the clock. Every pipeline has a process of its own,
all on the same --cores processors. On one of them PyTorch's loader works within its process, which
spares it handing images over; on more it has a worker for each. The pipelines take turns of
--images, and a turn ends when all that is prefetched is ready again: it costs just so many images,
and nobody works outside of it. Every round of turns gives a ratio; the table has medians. Turns
begin after the first images, for which XLA compiles; most of that is in the time to the first
batch. A few files serve again and again: all come from the page cache.
"""

import datetime
import functools
import importlib.util
import os
import platform
import statistics
import sys
import tempfile
import textwrap
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from benchmarks import pipelines
from benchmarks.turns import WARM_UP, Cost, measure
from deit_jax.config.validate import validate
from deit_jax.errors import InputError
from deit_jax.planning import markdown as reports

USAGE = "%(prog)s input --config=FILE [--config.GROUP.FIELD=VALUE ...] --data ROOT [options]"
KINDS = ("train", "three_augment", "eval")
JPEG = (".jpg", ".jpeg")
PACKAGES = ("tensorflow", "tensorflow-cpu", "torch", "torchvision", "timm", "pillow", "numpy")

Report = dict[str, Any]  # what --json prints


class Pipeline(NamedTuple):
    """One of those that are compared."""

    label: str
    build: Callable[[pipelines.Setup], Iterator[Any]]
    config: ConfigDict


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the flags of this part."""
    add = parser.add_argument
    add("--data", required=True, type=Path, metavar="ROOT", help="folder with train and val")
    add("--compare", choices=["timm"], help="also measure PyTorch's pipelines")
    add("--only", choices=KINDS, help="measure one kind of preprocessing")
    add("--cores", type=int, help="processors to use (default: all that may be used)")
    add("--rounds", type=int, default=7, help="turns of every pipeline (default: 7)")
    add("--images", type=int, default=1024, help="images in a turn (default: 1024)")
    add("--batch", type=int, default=256, help="images in a batch (default: 256)")


def run(arguments: Namespace) -> Report:
    """Measures.

    Raises:
      InputError: flags or data that are wrong, or nothing to compare the recipe with.
    """
    _check(arguments)
    kinds = [arguments.only] if arguments.only else list(KINDS)
    if arguments.config.input.three_augment and not arguments.only:
        kinds.remove("three_augment")  # it is the recipe's own
    splits = sorted({"val" if kind == "eval" else "train" for kind in kinds})
    files = {split: _jpegs(arguments.data / split) for split in splits}
    # More than all turns take: nobody comes to the end.
    total = arguments.images * (arguments.rounds + WARM_UP)
    total += arguments.batch * (4 + 2 * arguments.cores)
    groups = {}
    with tempfile.TemporaryDirectory() as root:
        config = arguments.config.copy_and_resolve_references()
        with config.unlocked():
            config.train.batch_size = arguments.batch
            config.dataset.update(
                source="folder", root=root, train_split="train", eval_split="val",
                label_file="", num_classes=0, train_fraction=1.0,
            )  # fmt: skip
        validate(config)
        wanted = {kind: compared(kind, config, with_timm=bool(arguments.compare)) for kind in kinds}
        for split, found in files.items():
            _link(found, Path(root) / split, total)
        for kind, those in wanted.items():
            print(f"{kind}: {', '.join(those)}", file=sys.stderr, flush=True)
            costs = measure(
                {
                    name: functools.partial(one.build, pipelines.Setup(one.config, arguments.cores))
                    for name, one in those.items()
                },
                cores=arguments.cores,
                turns=arguments.rounds,
                batches=arguments.images // arguments.batch,
            )
            groups[kind] = {
                "what": _what(kind, those["ours"].config.input),
                "pipelines": _figures(those, costs, arguments.images),
            }
    sizes = [file.stat().st_size for found in files.values() for file in found]
    return {
        "date": str(datetime.date.today()),
        "cpu": reports.processor(),
        "python": platform.python_version(),
        "versions": reports.versions(*PACKAGES),
        "cores": arguments.cores,
        "rounds": arguments.rounds,
        "images": arguments.images,
        "batch": arguments.batch,
        "files": {split: len(found) for split, found in files.items()},
        "median_file_bytes": statistics.median(sizes),
        "kinds": groups,
    }


def _check(arguments: Namespace) -> None:
    if not hasattr(os, "sched_setaffinity"):
        raise InputError("this system has no processor affinity; measure the input on Linux")
    if arguments.config is None:
        raise InputError("--config is missing; name a recipe, such as configs/deit_b.py")
    available = len(os.sched_getaffinity(0))
    arguments.cores = available if arguments.cores is None else arguments.cores
    if not 1 <= arguments.cores <= available:
        raise InputError(f"--cores is {arguments.cores}, expected 1 to {available}, all there are")
    for name in ("rounds", "images", "batch"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} is {getattr(arguments, name)}, expected 1 or more")
    if arguments.images % arguments.batch:
        raise InputError(
            f"--images is {arguments.images}, expected a multiple of --batch ({arguments.batch})"
        )
    if arguments.compare and not importlib.util.find_spec("timm"):
        raise InputError("--compare timm needs timm; install it with: pip install 'deit-jax[test]'")


def compared(kind: str, config: ConfigDict, *, with_timm: bool) -> dict[str, Pipeline]:
    """The pipelines for one of KINDS by name, ours first; those after `ours` are compared with it.

    Raises:
      InputError: PyTorch's side has nothing like the recipe.
    """
    if kind == "three_augment":
        config = _with(config, auto_augment="", three_augment=True, color_jitter=0.3)
    chosen = config.input
    by_timm = chosen.train_crop == "random_resized" and not (
        chosen.auto_augment and chosen.color_jitter
    )
    if with_timm and (
        chosen.train_crop == "small" or not (kind == "eval" or chosen.three_augment or by_timm)
    ):
        raise InputError(
            "--compare timm: nothing of PyTorch's is like config.input with train_crop "
            f"{chosen.train_crop!r}, auto_augment {chosen.auto_augment!r} and color_jitter "
            f"{chosen.color_jitter:g}; measure without --compare"
        )
    if kind == "eval":
        those = {"ours": Pipeline("ours, uint8", pipelines.ours_eval, config)}
        theirs = {
            "timm": Pipeline("timm, float32", pipelines.timm_eval, config),
            "timm_uint8": Pipeline("timm, uint8", pipelines.timm_eval_uint8, config),
        }
        return those | (theirs if with_timm else {})
    those = {"ours": Pipeline("ours, uint8", pipelines.ours_train, config)}
    if chosen.repeats > 1:
        label = "ours, uint8, every view from its file"
        those["ours_single"] = Pipeline(label, pipelines.ours_train, _with(config, repeats=1))
    if kind == "train" and chosen.train_crop == "random_resized":
        label = "decoding the crop of every view, no more"
        those["decode_and_crop"] = Pipeline(label, pipelines.decode_and_crop, config)
    if chosen.three_augment:
        build, build_uint8 = pipelines.reference_train, pipelines.reference_train_uint8
        names = ("reference", "reference's chain")
    else:
        build, build_uint8 = pipelines.timm_train, pipelines.timm_train_uint8
        names = ("timm", "timm")
    theirs = {
        names[0]: Pipeline(f"{names[1]}, float32", build, config),
        f"{names[0]}_uint8": Pipeline(f"{names[1]}, uint8", build_uint8, config),
    }
    return those | (theirs if with_timm else {})


def _with(config: ConfigDict, **fields: Any) -> ConfigDict:
    """A copy with other fields of `input`."""
    copy = config.copy_and_resolve_references()
    with copy.unlocked():
        copy.input.update(**fields)
    return copy


def _what(kind: str, chosen: ConfigDict) -> str:
    """What is done to the images, in words."""
    if kind == "eval":
        return (
            f"Evaluation: the short side to {int(chosen.image_size / chosen.crop_ratio)} pixels, "
            f"{chosen.interpolation}, and of that the central {chosen.image_size}."
        )
    steps = [
        f"{chosen.train_crop.replace('_', ' ')} crop of {chosen.image_size} pixels",
        chosen.interpolation,
        "flip",
        chosen.auto_augment,
        "one of grey, solarise and blur" if chosen.three_augment else "",
        f"colour jitter {chosen.color_jitter:g}" if chosen.color_jitter else "",
        f"{chosen.repeats} views of an image" if chosen.repeats > 1 else "",
    ]
    name = "3-Augment" if kind == "three_augment" else "Training"
    return f"{name}: {', '.join(filter(None, steps))}."


def _figures(
    those: dict[str, Pipeline], costs: dict[str, Cost], images: int
) -> dict[str, dict[str, Any]]:
    """The figures of every pipeline; times are seconds, times an image milliseconds."""
    figures = {}
    for name, cost in costs.items():
        per_image = [1e3 * seconds / images for seconds in cost.turns]
        ratios = [a / b for a, b in zip(cost.turns, costs["ours"].turns, strict=True)]
        figures[name] = {
            "label": those[name].label,
            "cpu_ms": statistics.median(per_image),
            "cpu_ms_rounds": per_image,
            "images_per_cpu_second": 1e3 / statistics.median(per_image),
            "ours_is_faster": statistics.median(ratios),
            "ours_is_faster_range": [min(ratios), max(ratios)],
            "first_batch_s": cost.first_wall,
            "first_batch_cpu_s": cost.first,
            "peak_memory_bytes": cost.peak,
        }
    return figures


def markdown(report: Report, command: str) -> Iterator[str]:
    """The lines of the report's section; the first is its heading."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    files = (
        " and ".join(f"{count:,} {split}" for split, count in report["files"].items()) + " JPEGs"
    )
    yield f"## Input pipeline, {report['cores']} core{'s' if report['cores'] != 1 else ''}"
    yield ""
    yield f"`{command}`"
    yield ""
    text = (
        f"{report['date']}, {report['cores']} of the processors of {report['cpu']}, Python "
        f"{report['python']}; {versions}. {files}, the median one of "
        f"{report['median_file_bytes'] / 1e3:,.0f} kB, again and again. CPU time: of a process and "
        f"its workers for an image, the median of {report['rounds']} rounds in which every "
        f"pipeline delivered {report['images']:,} images. Ours is faster: the CPU time of the row "
        "over that of ours in the same round, median and extremes. First batch: of "
        f"{report['batch']}, from the start of the process, by the clock and in CPU time. Memory: "
        "the largest at any time."
    )
    yield from textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)
    for group in report["kinds"].values():
        yield ""
        yield group["what"]
        yield ""
        yield "| pipeline | CPU time | images / CPU s | ours is faster | first batch | memory |"
        yield "|---|---|---|---|---|---|"
        for name, one in group["pipelines"].items():
            low, high = one["ours_is_faster_range"]
            faster = f"{one['ours_is_faster']:.2f}× ({low:.2f}–{high:.2f})"
            yield (
                f"| {one['label']} | {one['cpu_ms']:.2f} ms | {one['images_per_cpu_second']:,.0f} "
                f"| {'' if name == 'ours' else faster} "
                f"| {one['first_batch_s']:.1f} s ({one['first_batch_cpu_s']:.1f} s) "
                f"| {one['peak_memory_bytes'] / 2**30:.2f} GiB |"
            )


def _jpegs(folder: Path) -> list[Path]:
    """The JPEG files of the class folders, sorted."""
    files = sorted(file for file in folder.glob("*/*") if file.suffix.lower() in JPEG)
    if not files:
        raise InputError(
            f"--data: no JPEG files in {folder}/CLASS/; expected the root of train, val"
        )
    return files


def _link(files: list[Path], folder: Path, count: int) -> None:
    """Makes `count` links in class folders to files taken in turn, evenly where they are more."""
    chosen = files[:: max(1, len(files) // count)][:count]
    for number in range(count):
        file = chosen[number % len(chosen)]
        place = folder / file.parent.name
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:07d}{file.suffix}").symlink_to(file.resolve())
