"""Measures how a large TFDS data set opens: from a scan of its files, and from the cache of one.

python tools/benchmark.py index --records 1281167 --shards 1024

The data set is made for it, of tiny JPEGs in TFRecord files, in a temporary folder (about 1 GB for
ImageNet's size; TMPDIR says where).
"""

import functools
import io
import os
import statistics
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from benchmarks.turns import Program, Runner
from deit_jax.cli.arguments import new_file, one_or_more
from deit_jax.config.fields import default_config
from deit_jax.config.plan import plan_data
from deit_jax.config.validate import validate
from deit_jax.console import log_error
from deit_jax.errors import InputError
from deit_jax.planning.markdown import head, origin, processor, publish, table

RECIPE = ""
PACKAGES = ("tensorflow", "tensorflow-cpu", "tensorflow-datasets", "numpy")
CLASSES = 1000
STEPS = (0, 10_000_000)
ROUNDS = 3  # in turns
STARTS = ("first", "second")

Report = dict[str, Any]  # what --json prints


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the flags of this part."""
    add, number = parser.add_argument, {"type": one_or_more, "metavar": "N"}
    add("--records", **number, default=1_281_167, help="records (default: 1281167)")
    add("--shards", **number, default=1024, help="TFRecord files (default: 1024)")
    add("--batch", **number, default=256, help="images in a batch (default: 256)")
    add("--write", type=new_file, metavar="FILE", help="also put the report into this file")


def run(arguments: Namespace, emit: Callable[[Report], None]) -> None:
    """Makes the data set, measures and reports.

    Raises:
      InputError: fewer records than shards, or than are in a batch.
    """
    records, shards, batch = arguments.records, arguments.shards, arguments.batch
    if records < max(shards, batch):
        raise InputError(
            f"--records is {records}, expected at least --shards ({shards}) and --batch ({batch})"
        )
    with tempfile.TemporaryDirectory() as root:
        config = default_config()
        config.train.batch_size = batch
        config.dataset.update(source="tfds", root=root, name="tiny", eval_split="train")
        # Little work besides: what is left is finding and reading the records.
        config.input.update(image_size=32, auto_augment="")
        validate(config)
        log_error(f"writing {records:,} records")
        size = write_data_set(Path(root) / "tiny" / "1.0.0", records, shards)
        starts = {}
        for start in STARTS:  # each in a new process; the first leaves the cache to the second
            with Runner(start, functools.partial(_opened, config, f"{root}/cache")) as runner:
                starts[start] = runner.facts
            files = Path(root, "cache").rglob("*.npy")
            starts[start]["cache_bytes"] = sum(file.stat().st_size for file in files)
    report = {
        **origin(*PACKAGES),
        "cpu": processor(),
        "records": records,
        "shards": shards,
        "bytes": size,
        "batch": batch,
        "starts": starts,
    }
    publish(markdown(report, arguments.command_line), arguments.write)
    emit(report)


def write_data_set(folder: Path, records: int, shards: int) -> int:
    """Writes a TFDS data set with the split "train"; returns the bytes of its TFRecord files."""
    import numpy as np
    import tensorflow as tf
    import tensorflow_datasets as tfds
    from PIL import Image

    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=CLASSES),
        }
    )
    examples = []
    for label in range(CLASSES):
        with io.BytesIO() as file:
            color = tuple(np.random.RandomState(label).randint(256, size=3))
            Image.new("RGB", (16, 16), color).save(file, "JPEG")
            example = features.encode_example({"image": file.getvalue(), "label": label})
        examples.append(features.serialize_example(example))
    folder.mkdir(parents=True)
    bounds = np.linspace(0, records, shards + 1).astype(int)
    size = 0
    for shard in range(shards):
        file = folder / f"tiny-train.tfrecord-{shard:05d}-of-{shards:05d}"
        with tf.io.TFRecordWriter(str(file)) as writer:
            for number in range(bounds[shard], bounds[shard + 1]):
                writer.write(examples[number % CLASSES])
        size += file.stat().st_size
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=np.diff(bounds).tolist(),
        num_bytes=size,
        filename_template=tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name="tiny", split="train", filetype_suffix="tfrecord"
        ),
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=[split], check_data=False
    )
    return size


def _opened(config: ConfigDict, cache: str) -> Program:
    """Opens the data set in this process, and times that and the first batch from some steps on."""
    os.environ["XDG_CACHE_HOME"] = cache
    import tensorflow as tf

    from deit_jax import data
    from deit_jax.data import tfds  # noqa: F401  its import is not a part of what is timed

    before, cpu, begin = _resident(), time.process_time(), time.perf_counter()
    source = data.open_source(config.dataset, "train")
    facts = {
        "open_s": time.perf_counter() - begin,
        "open_cpu_s": time.process_time() - cpu,
        "resident_before_bytes": before,
        "resident_after_bytes": _resident(),
        "index_bytes": sum(
            _size(part) for part in vars(source.records).values() if tf.is_tensor(part)
        ),
    }
    plan = data.InputPlan.of(config, plan_data(config, source, num_devices=1))
    waits = {step: [] for step in STEPS}
    for step in (0, *STEPS * ROUNDS):
        begin = time.perf_counter()
        next(data.train_batches(source, plan, start_step=step))
        waits[step].append(time.perf_counter() - begin)
    del waits[0][0]  # for it, XLA compiled
    facts["batch_s"] = {str(step): statistics.median(found) for step, found in waits.items()}
    facts["batch_s_rounds"] = {str(step): found for step, found in waits.items()}
    return Program(lambda _: None, facts, lambda: None)


def _resident() -> int:
    """Returns the bytes of memory that this process holds now."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _size(tensor: Any) -> int:
    array = tensor.numpy()
    return sum(map(len, array)) if array.dtype == object else array.nbytes


def markdown(report: Report, command: str) -> Iterator[str]:
    """Yields the lines of the report's section; the first is its heading."""
    title = f"Index of {report['records']:,} records in {report['shards']:,} TFRecord files"
    yield from head(title, command, report, report["cpu"])
    cache = report["starts"]["first"]["cache_bytes"]
    yield f"{report['bytes'] / 1e6:,.0f} MB of tiny JPEGs; batches of {report['batch']}."
    yield f"Cache of offsets: {cache / 1e6:.1f} MB." if cache else "So few are not cached."
    yield ""
    steps = [f"batch of step {step:,}" for step in STEPS]
    rows = [
        (
            start,
            f"{one['open_s']:.2f} s ({one['open_cpu_s']:.2f} s)",
            f"{one['index_bytes'] / 1e6:.1f} MB",
            f"{one['resident_before_bytes'] / 1e6:,.0f} MB",
            f"{one['resident_after_bytes'] / 1e6:,.0f} MB",
            *(f"{1e3 * seconds:,.0f} ms" for seconds in one["batch_s"].values()),
        )
        for start, one in report["starts"].items()
    ]
    columns = ("start", "opened in", "index", "memory before", "memory after", *steps)
    yield from table(*columns, rows=rows)
