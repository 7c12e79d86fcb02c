"""Data sets of the Hugging Face hub, or a folder of Parquet files, through the library datasets."""

import dataclasses
import os
import re
from typing import Any

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from deit_jax import storage
from deit_jax.data.source import Source, count_classes, fixed_fraction, in_python
from deit_jax.errors import InputError, TransientError, brief
from deit_jax.trees import digest


@dataclasses.dataclass(eq=False, kw_only=True)
class HfSource(Source):
    """One split, a part or a union: "train[:90%]", "train+test"."""

    split: str
    files: list[Any]  # pyarrow arrays of encoded images, null for a file at a path
    starts: np.ndarray  # the first row of each
    paths: Any  # pyarrow.ChunkedArray of strings; beside an encoded image, a name or null
    labels: tf.Tensor  # int32, of all rows of the split
    chosen: tf.Tensor  # int64 [num_examples], numbers of rows

    def fetch(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """See Source."""
        data = tf.numpy_function(self.read, [index], tf.string)
        return self.parse(tf.ensure_shape(data, ()), index)

    def parse(self, data: tf.Tensor, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """See Source."""
        return data, tf.gather(self.labels, tf.gather(self.chosen, index))

    def read(self, index: int) -> bytes:
        """See Source."""
        from pyarrow import BufferReader

        row = in_python(self.chosen)[index]
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        cell = self.files[part].slice(int(row - self.starts[part]), 1)
        if cell.null_count:
            path = self.paths[int(row)].as_py()
            if not path:
                raise InputError("the row holds no image")
            with open(path, "rb") as file:
                return file.read()
        # The table is a memory map: copying a row may wait for the disk. BufferReader lets other
        # threads go on meanwhile, cell[0] does not.
        _, offsets, content = cell.buffers()
        begin, end = np.frombuffer(offsets, np.int32, 2, 4 * cell.offset).tolist()
        return BufferReader(content.slice(begin, end - begin)).read(end - begin)

    def fingerprint(self) -> str:
        """See Source. The library's own depends on the place and the age of the files."""
        from pyarrow import compute

        sizes = [compute.fill_null(compute.binary_length(part), -1) for part in self.files]
        names = compute.replace_substring_regex(self.paths, r"^.*[/\\]", "").to_pylist()
        return digest("\n".join(n or "" for n in names), *sizes, self.labels, self.chosen)

    def example_id(self, index: int) -> str:
        """Returns the split and the number of the row in it."""
        return f"{self.split}:{int(self.chosen[index])}"


def open_hf(dataset: ConfigDict, split: str) -> HfSource:
    """Opens `name` of the hub, OWNER/NAME or OWNER/NAME:CONFIG, or the folder `root`.

    The library downloads what is not in its cache and writes all rows there, as Arrow files. Of
    processes that share the cache one does so, the others wait. No code of a data set is run.

    Raises:
      InputError: the data are not there, or their columns or classes do not fit.
      TransientError: the hub does not answer.
    """
    try:
        from datasets import ClassLabel, Image, ReadInstruction, Value, load_dataset
        from pyarrow import compute
    except ImportError:
        raise InputError(
            "config.dataset.source is 'hf', which needs the package datasets; "
            "install it with: pip install 'deit-jax[hf]'"
        ) from None
    name, _, config = dataset.name.partition(":")
    place = os.fspath(storage.path_of(dataset.root)) if dataset.root else name
    # Of a folder of that name and the hub, the library would prefer the folder.
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not os.path.exists(name)
    if not (not name and os.path.isdir(place) if dataset.root else on_hub):
        raise InputError(
            f"config.dataset.name is {dataset.name!r} and root is {dataset.root!r}, expected "
            "OWNER/NAME of the hub and no root, or no name and a folder on a disk"
        )
    where, name = f"{place}:{config}" if config else place, dataset[f"{split}_split"]
    wrong = f"config.dataset.{split}_split is {name!r}, {where}"
    try:
        rows = load_dataset(place, config or None, split=name)
        sizes = {each: info.num_examples for each, info in rows.info.splits.items()}
        parts = ReadInstruction.from_spec(name).to_absolute(sizes)
    except Exception as error:  # of many classes, also of the libraries below
        known = dataset.root or isinstance(error, FileNotFoundError | RuntimeError | ValueError)
        reason = f"{wrong}: {brief(error.__cause__ or error)}"
        raise (InputError if known else TransientError)(reason) from error
    if len(rows) != sum(part.to - part.from_ for part in parts):  # of [3:1] it makes [3:]
        raise InputError(f"{wrong}: that part ends before it begins; splits and sizes: {sizes}")
    kinds = rows.features
    images, labels, values = (
        [at for at in kinds if isinstance(kinds[at], kind)] for kind in (Image, ClassLabel, Value)
    )
    labels = labels or [at for at in values if "int" in kinds[at].dtype]
    if not len(images) == len(labels) == 1:
        listed = ", ".join(f"{at} ({type(kinds[at]).__name__})" for at in kinds)
        raise InputError(
            f"{where} has the columns {listed}, expected one Image and one ClassLabel, or else one "
            "Value of integers; write Parquet files without the others (remove_columns, to_parquet)"
        )
    names = getattr(kinds[labels[0]], "names", ())
    num_classes = count_classes(dataset, len(names), where)
    # A label that is missing, or too large for int32, stays outside the classes.
    numbers = compute.cast(rows.data.column(labels[0]), "int64", safe=False)
    numbers = np.clip(compute.fill_null(numbers, -1).to_numpy(), -1, np.iinfo(np.int32).max)
    chosen = fixed_fraction(numbers, dataset.train_fraction if split == "train" else 1)
    files, paths = (compute.struct_field(rows.data.column(images[0]), i) for i in (0, 1))
    return HfSource(
        description=f"Hugging Face {where}, {name}",
        num_examples=len(chosen),
        num_classes=num_classes,
        class_names=tuple(names) if num_classes == len(names) else (),
        split=name,
        files=files.chunks,
        starts=np.cumsum([0, *map(len, files.chunks)])[:-1],
        paths=paths,
        labels=tf.constant(numbers, tf.int32),
        chosen=tf.constant(chosen, tf.int64),
    )
