"""Compares the places where images may be stored: a folder, TFDS's two formats, a slow store.

It is `tools/benchmark.py input --latency-ms N`: the pipeline for training over copies of the same
images in the same order. The slow store is the folder, where every read takes N ms longer.
"""

import contextlib
import shutil
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from benchmarks import pipelines
from benchmarks.turns import QUIET, Runner, Turn, deliver, take_turns
from deit_jax.config.validate import validate
from deit_jax.errors import InputError
from deit_jax.planning.markdown import head, origin, processor, publish, table

PACKAGES = ("tensorflow", "tensorflow-cpu", "tensorflow-datasets", "array-record", "numpy")
COPIES = 1280  # images that are stored, 138 MB of ImageNet's

Report = dict[str, Any]  # what --json prints


def run(arguments: Namespace, cores: list[int], emit: Callable[[Report], None]) -> None:
    """Stores the images in every way, measures and reports.

    Raises:
      InputError: no JPEGs in the folder train of --data.
    """
    images, rounds, batch = arguments.images, arguments.rounds, arguments.batch
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as stack:
        size = store(arguments.data / "train", Path(root), COPIES)
        runners = {}
        for name, (source, latency) in stores(arguments.latency_ms).items():
            config = configured(arguments.config, root, source, batch)
            build = partial(deliver, partial(batches, config, latency))
            runners[name] = stack.enter_context(Runner(name, build, cores))
        turns = take_turns(runners, rounds=rounds, count=images // batch)
        figures = {
            name: {**_figures(turns[name], turns["folder"], images), **runner.facts}
            for name, runner in runners.items()
        }
    report = {
        **origin(*PACKAGES),
        "recipe": arguments.config_file,
        "cpu": processor(),
        "cores": len(cores),
        "rounds": rounds,
        "images": images,
        "batch": batch,
        "stored_images": COPIES,
        "stored_bytes": size,
        "latency_ms": arguments.latency_ms,
        "stores": figures,
    }
    publish(markdown(report, arguments.command_line), arguments.write)
    emit(report)


def stores(latency_ms: int) -> dict[str, tuple[str, int]]:
    """Returns by name how the images are stored, and the milliseconds that a read waits."""
    names = ("folder", "tfrecord", "array_record")
    return {name: (name, 0) for name in names} | {f"{latency_ms} ms a read": ("folder", latency_ms)}


def store(source: Path, root: Path, count: int) -> int:
    """Stores copies of JPEGs in folders of `root`: one for each way; returns the bytes of one.

    Args:
      source: holds CLASS/*.JPEG.
      root: gets the folders folder, tfrecord and array_record.
      count: of copies; the images are taken in turn.
    """
    import tensorflow_datasets as tfds

    files = sorted(f for f in source.glob("*/*") if f.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise InputError(f"--data: no JPEG files in {source}/CLASS/; expected the root of train")
    copies = []
    for number in range(count):
        file = files[number % len(files)]
        copies.append(root / "folder" / "train" / file.parent.name / f"{number:07d}.jpg")
        copies[-1].parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copies[-1])
    copies.sort()  # as the pipeline does
    features = {
        "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names=sorted({file.parent.name for file in copies})),
    }
    examples = [
        (number, {"image": str(file), "label": file.parent.name})
        for number, file in enumerate(copies)
    ]
    for file_format in ("tfrecord", "array_record"):
        tfds.dataset_builders.store_as_tfds_dataset(
            name="copies",
            version="1.0.0",
            features=tfds.features.FeaturesDict(features),
            split_datasets={"train": examples},
            data_dir=str(root / file_format),
            file_format=file_format,
            disable_shuffling=True,
        )
    return sum(file.stat().st_size for file in copies)


def configured(recipe: ConfigDict, root: str, source: str, batch: int) -> ConfigDict:
    """Returns the recipe for the images that are stored in one way below `root`."""
    config = recipe.copy_and_resolve_references()
    folder = source == "folder"
    with config.unlocked():
        config.train.batch_size = batch
        config.dataset.update(
            source="folder" if folder else "tfds", root=f"{root}/{source}", label_file="",
            name="" if folder else "copies", num_classes=0, train_split="train",
            eval_split="train", train_fraction=1.0,
        )  # fmt: skip
    validate(config)
    return config


def batches(config: ConfigDict, latency_ms: int) -> Iterator[Any]:
    """Our batches for training from a store that lets every read wait."""
    from deit_jax.data.source import Source, read_threads

    def slow(source: Source) -> None:
        read = source.read

        def late(index: int) -> bytes:
            time.sleep(latency_ms / 1e3)
            return read(index)

        source.read = late
        source.read_threads = read_threads("gs://bucket")  # as many as for an object store

    return pipelines.ours(config, train=True, change=slow if latency_ms else None)


def _figures(turns: list[Turn], folder: list[Turn], images: int) -> dict[str, Any]:
    """The figures of a store; `of_folder` and `clock_of_folder` compare speeds round by round."""
    clock = [turn.wall - QUIET for turn in turns]
    pairs = list(zip(turns, folder, strict=True))
    cpu_ratios = [other.cpu / turn.cpu for turn, other in pairs]
    clock_ratios = [(other.wall - QUIET) / (turn.wall - QUIET) for turn, other in pairs]
    return {
        "images_per_cpu_second": images / statistics.median(turn.cpu for turn in turns),
        "of_folder": statistics.median(cpu_ratios),
        "of_folder_range": [min(cpu_ratios), max(cpu_ratios)],
        "images_per_second": images / statistics.median(clock),
        "clock_of_folder": statistics.median(clock_ratios),
        "clock_of_folder_range": [min(clock_ratios), max(clock_ratios)],
        "peak_memory_bytes": turns[-1].peak_memory,
    }


def markdown(report: Report, command: str) -> Iterator[str]:
    """Yields the lines of the report's section; the first is its heading."""
    title = f"Storage for {report['recipe']}, {report['cores']} core(s)"
    yield from head(title, command, report, report["cpu"])
    yield f"{report['stored_images']:,} JPEGs, {report['stored_bytes'] / 1e6:,.0f} MB, again and"
    yield f"again; {report['rounds']} rounds of {report['images']:,} images in batches of"
    yield f"{report['batch']}."
    yield ""
    columns = ("store", "images / CPU s", "× folder", "images / s", "× folder", "memory")
    rows = [
        (
            name,
            f"{one['images_per_cpu_second']:,.0f}",
            _ratio(one["of_folder"], *one["of_folder_range"]),
            f"{one['images_per_second']:,.0f}",
            _ratio(one["clock_of_folder"], *one["clock_of_folder_range"]),
            f"{one['peak_memory_bytes'] / 2**30:.2f} GiB",
        )
        for name, one in report["stores"].items()
    ]
    yield from table(*columns, rows=rows)


def _ratio(median: float, low: float, high: float) -> str:
    return f"{median:.2f} ({low:.2f}–{high:.2f})"
