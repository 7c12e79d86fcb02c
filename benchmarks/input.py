"""Measures what an image costs the input pipeline in CPU time: ours, and PyTorch's beside it.

python tools/benchmark.py input --config=deit_b --data ROOT --compare timm --cores 1
python tools/benchmark.py input --config=deit3:b --data ROOT --compare timm --only train --json
python tools/benchmark.py input --config=deit_b --data ROOT --latency-ms 50 --cores 2

ROOT holds {train,val}/CLASS/*.JPEG. Training and evaluation of the recipe are measured, in turns
with PyTorch's pipelines for the same. docs/benchmarks.md explains the figures.
"""

import contextlib
import itertools
import os
import statistics
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from benchmarks import pipelines, stores
from benchmarks.turns import WARM_UP, Runner, Turn, deliver, take_turns
from deit_jax.cli.arguments import new_file, one_or_more
from deit_jax.config.validate import validate
from deit_jax.errors import InputError
from deit_jax.planning.markdown import head, origin, processor, publish, table

RECIPE = "required"
PACKAGES = ("tensorflow", "tensorflow-cpu", "torch", "torchvision", "timm", "pillow", "numpy")

Report = dict[str, Any]  # what --json prints


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the flags of this part."""
    add, number = parser.add_argument, {"type": one_or_more, "metavar": "N"}
    add("--data", required=True, type=Path, metavar="ROOT", help="folder with train and val")
    add("--compare", choices=["timm"], help="also measure PyTorch's pipelines")
    add("--only", choices=["train", "eval"], help="measure one kind of preprocessing")
    add("--cores", **number, help="processors to use (default: all that may be used)")
    add("--rounds", **number, default=7, help="turns of every pipeline (default: 7)")
    add("--images", **number, default=1024, help="images in a turn (default: 1024)")
    add("--batch", **number, default=256, help="images in a batch (default: 256)")
    add(
        "--latency-ms",
        **number,
        help="compare storage instead: folder, TFRecord, ArrayRecord, and a folder so slow a read",
    )
    add("--write", type=new_file, metavar="FILE", help="also put the report into this file")


def run(arguments: Namespace, emit: Callable[[Report], None]) -> None:
    """Measures and reports.

    Raises:
      InputError: flags or data that are wrong, or nothing to compare the recipe with.
    """
    if arguments.compare and not find_spec("timm"):
        raise InputError("--compare timm needs timm; install it with: pip install 'deit-jax[test]'")
    available = sorted(os.sched_getaffinity(0))
    cores = len(available) if arguments.cores is None else arguments.cores
    images, rounds, batch = arguments.images, arguments.rounds, arguments.batch
    if cores > len(available):
        raise InputError(f"--cores is {cores}, but only {len(available)} may be used")
    if images % batch:
        raise InputError(f"--images is {images}, expected a multiple of --batch ({batch})")
    if arguments.latency_ms:
        if arguments.compare or arguments.only:
            raise InputError("--latency-ms compares storage in training: without --compare, --only")
        stores.run(arguments, available[:cores], emit)
        return
    # More than all turns take: no pipeline reaches the end.
    total = images * (rounds + WARM_UP) + batch * (4 + 2 * cores)
    kinds = [kind for kind in ("train", "eval") if arguments.only in (None, kind)]
    files, groups = {}, {}
    with tempfile.TemporaryDirectory() as root:
        config = arguments.config.copy_and_resolve_references()
        with config.unlocked():
            config.train.batch_size = batch
            config.dataset.update(
                source="folder", root=root, train_split="train", eval_split="val",
                label_file="", num_classes=0, train_fraction=1.0,
            )  # fmt: skip
        validate(config)
        for split in ("train" if kind == "train" else "val" for kind in kinds):
            files[split] = _link(arguments.data / split, Path(root) / split, total)
        for kind in kinds:
            builders = compared(kind, config, cores, with_timm=bool(arguments.compare))
            with contextlib.ExitStack() as stack:
                runners = {}
                for label, build in builders.items():
                    runner = Runner(f"{kind}, {label}", partial(deliver, build), available[:cores])
                    runners[label] = stack.enter_context(runner)
                turns = take_turns(runners, rounds=rounds, count=images // batch)
            groups[kind] = {
                label: _figures(runner.facts, turns[label], turns["ours, uint8"], images)
                for label, runner in runners.items()
            }
    report = {
        **origin(*PACKAGES),
        "recipe": arguments.config_file,
        "cpu": processor(),
        "cores": cores,
        "rounds": rounds,
        "images": images,
        "batch": batch,
        "files": {split: len(sizes) for split, sizes in files.items()},
        "median_file_bytes": statistics.median(itertools.chain(*files.values())),
        "kinds": groups,
    }
    publish(markdown(report, arguments.command_line), arguments.write)
    emit(report)


def compared(
    kind: str, config: ConfigDict, cores: int, *, with_timm: bool
) -> dict[str, Callable[[], Iterator[Any]]]:
    """Returns the pipelines of "train" or "eval" by label, ours first.

    Raises:
      InputError: PyTorch's side has nothing like the recipe.
    """
    train, chosen = kind == "train", config.input
    found = {"ours, uint8": partial(pipelines.ours, config, train=train)}
    if not with_timm:
        return found
    by_timm = chosen.train_crop == "random_resized" and not (
        chosen.auto_augment and chosen.color_jitter
    )
    if chosen.train_crop == "small" or (train and not (chosen.three_augment or by_timm)):
        raise InputError(
            "--compare timm: PyTorch has nothing like config.input with train_crop "
            f"{chosen.train_crop!r}, auto_augment {chosen.auto_augment!r} and color_jitter "
            f"{chosen.color_jitter:g}; measure without --compare"
        )
    if train and chosen.three_augment:
        name, build = "reference's chain", partial(pipelines.reference, config, cores)
    else:
        name, build = "timm", partial(pipelines.timm, config, cores, train=train)
    found[f"{name}, float32"] = partial(build, in_uint8=False)
    found[f"{name}, uint8"] = partial(build, in_uint8=True)
    return found


def _figures(facts: dict, turns: list[Turn], ours: list[Turn], images: int) -> dict[str, Any]:
    """The figures of a pipeline; `ours_is_faster` says how many times, round by round."""
    per_image = [1e3 * turn.cpu / images for turn in turns]
    ratios = [turn.cpu / other.cpu for turn, other in zip(turns, ours, strict=True)]
    return {
        "cpu_ms": statistics.median(per_image),
        "cpu_ms_rounds": per_image,
        "images_per_cpu_second": 1e3 / statistics.median(per_image),
        "ours_is_faster": statistics.median(ratios),
        "ours_is_faster_range": [min(ratios), max(ratios)],
        "first_batch_s": facts["first_s"],
        "first_batch_cpu_s": facts["first_cpu_s"],
        "peak_memory_bytes": turns[-1].peak_memory,
    }


def markdown(report: Report, command: str) -> Iterator[str]:
    """Yields the lines of the report's section; the first is its heading."""
    title = f"Input pipeline of {report['recipe']}, {report['cores']} core(s)"
    yield from head(title, command, report, report["cpu"])
    files = " and ".join(f"{count:,} {split}" for split, count in report["files"].items())
    size = report["median_file_bytes"] / 1e3
    yield f"{files} JPEGs, again and again, the median one of {size:.0f} kB; {report['rounds']}"
    yield f"rounds of {report['images']:,} images in batches of {report['batch']}."
    columns = ("CPU time", "images / CPU s", "ours is faster", "first batch", "memory")
    for kind, group in report["kinds"].items():
        rows = []
        for label, one in group.items():
            low, high = one["ours_is_faster_range"]
            faster = f"{one['ours_is_faster']:.2f}× ({low:.2f}–{high:.2f})"
            first = f"{one['first_batch_s']:.1f} s ({one['first_batch_cpu_s']:.1f} s)"
            row = (
                label,
                f"{one['cpu_ms']:.2f} ms",
                f"{one['images_per_cpu_second']:,.0f}",
                "" if label.startswith("ours") else faster,
                first,
                f"{one['peak_memory_bytes'] / 2**30:.2f} GiB",
            )
            rows.append(row)
        yield ""
        yield from table(f"pipeline, {kind}", *columns, rows=rows)


def _link(source: Path, target: Path, count: int) -> list[int]:
    """Makes `count` links to the JPEGs of the class folders, taken in turn; their sizes in bytes.

    Where there are more, evenly spread ones are taken.
    """
    files = sorted(f for f in source.glob("*/*") if f.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise InputError(
            f"--data: no JPEG files in {source}/CLASS/; expected the root of train, val"
        )
    chosen = files[:: max(1, len(files) // count)][:count]
    for number in range(count):
        file = chosen[number % len(chosen)]
        place = target / file.parent.name
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:07d}{file.suffix}").symlink_to(file.resolve())
    return [file.stat().st_size for file in files]
