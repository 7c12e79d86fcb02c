"""Prepared TFDS data sets on disk, in TFRecord or ArrayRecord files, with random access."""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from deit_jax import storage
from deit_jax.data.source import Source, count_classes, fixed_fraction, in_python, read_threads
from deit_jax.data.tfrecord import Part, TfRecords
from deit_jax.errors import InputError, brief
from deit_jax.trees import digest

Instructions = Sequence[tfds.core.utils.shard_utils.FileInstruction]


@dataclasses.dataclass(eq=False, kw_only=True)
class TfdsSource(Source):
    """One split of a prepared TFDS data set, a part or a union: "train[:90%]", "train+test"."""

    split: str
    features: tfds.features.FeaturesDict  # image and label alone
    records: "TfRecords | _ArrayRecords"
    chosen: tf.Tensor | None  # int64 [num_examples], numbers of records; None: all

    def fetch(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """See Source."""
        return self.parse(self.records.read(self._number(index)), index)

    def read(self, index: int) -> bytes:
        """See Source."""
        number = index if self.chosen is None else in_python(self.chosen)[index]
        return self.records.read_bytes(int(number))

    def parse(self, record: tf.Tensor, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """See Source."""
        decoders = {"image": tfds.decode.SkipDecoding()}
        example = self.features.deserialize_example(record, decoders=decoders)
        return example["image"], tf.cast(example["label"], tf.int32)

    def fingerprint(self) -> str:
        """See Source."""
        return digest(self.records.fingerprint(), () if self.chosen is None else self.chosen)

    def example_id(self, index: int) -> str:
        """Returns the split and the number of the record in it."""
        return f"{self.split}:{int(self._number(index))}"

    def _number(self, index: tf.Tensor) -> tf.Tensor:
        return index if self.chosen is None else tf.gather(self.chosen, index)


def open_tfds(dataset: ConfigDict, split: str) -> TfdsSource:
    """Opens the data set `name` (or "name:version") under `root`, which is TFDS's `data_dir`.

    Nothing is downloaded or prepared, and no code of the data set is run. `train_fraction` takes
    records at random: to stratify it, all labels would have to be read.

    Args:
      dataset: the `dataset` group of the config.
      split: "train" or "eval".

    Raises:
      InputError: not prepared there, no such split or none of its records, no image and label
        features, pixels of another type, labels that do not fit `num_classes`, or a file that is
        missing or damaged.
    """
    field = f"config.dataset.{split}_split"
    name = dataset[f"{split}_split"]
    builder = _open_builder(dataset)
    info = builder.info
    where = f"{info.full_name} in {builder.data_path}"
    try:
        instructions = info.splits[name].file_instructions
    except ValueError:
        raise InputError(
            f"{field} is {name!r}, but {where} has the splits {', '.join(info.splits)}"
        ) from None
    if not sum(part.take for part in instructions):
        sizes = {each: found.num_examples for each, found in info.splits.items()}
        raise InputError(
            f"{field} is {name!r}, but that part of {where} has no records; splits and sizes: "
            f"{sizes}"
        )
    features = _image_and_label(info.features, where)
    label = features["label"]
    num_classes = count_classes(dataset, label.num_classes, where)
    if info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        if storage.is_remote(instructions[0].filename):
            raise InputError(
                f"{where}: array_record files are read from disks only; copy them to one, or "
                "prepare the data set as tfrecord"
            )
        records = _ArrayRecords(instructions)
    elif info.file_format == tfds.core.FileFormat.TFRECORD:
        records = TfRecords(
            [Part(i.filename, i.examples_in_shard, i.skip, i.take) for i in instructions]
        )
    else:
        raise InputError(
            f"{where} is stored as {info.file_format.value}, expected array_record or tfrecord; "
            "prepare it again in one of these"
        )
    fraction = dataset.train_fraction if split == "train" else 1
    chosen = None
    if fraction < 1:
        chosen = tf.constant(fixed_fraction(np.zeros(len(records)), fraction), tf.int64)
    return TfdsSource(
        description=f"TFDS {where}, {name}",
        read_threads=read_threads(str(builder.data_path)),
        num_examples=len(records) if chosen is None else len(chosen),
        num_classes=num_classes,
        class_names=tuple(label.names) if num_classes == label.num_classes else (),
        split=name,
        features=features,
        records=records,
        chosen=chosen,
    )


def _open_builder(dataset: ConfigDict) -> tfds.core.DatasetBuilder:
    name = dataset.name
    root = os.fspath(storage.path_of(dataset.root)) if dataset.root else None
    if not name:
        raise InputError("config.dataset.name is empty, expected a TFDS name or name:version")
    try:
        # Not tfds.builder: it prefers the installed code's version over the one that is on disk.
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=root)
    # DatasetNotFoundError is a ValueError; "name/key=1", with arguments, is a TypeError.
    except (ValueError, TypeError):
        place = root or "TFDS's default folder (config.dataset.root is empty)"
        raise InputError(
            f"config.dataset.name is {name!r}, but no such prepared data set is in {place}; check "
            "config.dataset.root, or prepare it there with `tfds build`"
        ) from None
    if not builder.info.splits:
        raise InputError(
            f"{builder.data_path} has no splits: its preparation did not finish; run `tfds build`"
        )
    return builder


def _image_and_label(
    features: tfds.features.FeaturesDict, where: str
) -> tfds.features.FeaturesDict:
    """Returns the two features we need; the others are never parsed."""
    wanted = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
    found = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    if not all(isinstance(found.get(name), kind) for name, kind in wanted.items()):
        listed = ", ".join(f"{name} ({type(f).__name__})" for name, f in found.items()) or "none"
        raise InputError(
            f"{where} has the features {listed}, expected image (Image) and label (ClassLabel)"
        )
    dtype = np.dtype(found["image"].np_dtype).name
    if dtype not in ("uint8", "uint16"):  # float32 is stored as the bytes of a PNG with alpha
        raise InputError(
            f"{where} has images of {dtype}, expected uint8 or uint16; prepare it again with these"
        )
    return tfds.features.FeaturesDict({name: found[name] for name in wanted})


class _ArrayRecords:
    """Records of ArrayRecord files, through their own random-access reader."""

    def __init__(self, instructions: Instructions) -> None:
        """Opens the files.

        Raises:
          InputError: one of them cannot be read.
        """
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        for part in instructions:
            try:
                os.stat(part.filename)
            except OSError as error:
                raise InputError(f"{part.filename}: cannot be read ({brief(error)})") from None
        self._instructions = instructions
        self._source = ArrayRecordDataSource(instructions)

    def __len__(self) -> int:
        return len(self._source)

    def fingerprint(self) -> str:
        """Returns a digest of the names, the sizes and the used parts of the files."""
        return digest(
            *(
                f"{os.path.basename(part.filename)} {os.path.getsize(part.filename)} "
                f"{part.skip} {part.take}"
                for part in self._instructions
            )
        )

    def read(self, index: tf.Tensor) -> tf.Tensor:
        """Returns the serialised example, a scalar string."""
        return tf.ensure_shape(tf.numpy_function(self.read_bytes, [index], tf.string), ())

    def read_bytes(self, index: int) -> bytes:
        """Reads in Python."""
        return self._source[int(index)]
