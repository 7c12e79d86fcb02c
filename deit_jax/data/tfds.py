"""Prepared TFDS data sets on disk, in TFRecord or ArrayRecord files, with random access."""

import dataclasses
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from deit_jax.data.source import Source, fixed_fraction
from deit_jax.errors import InputError
from deit_jax.trees import digest

_LENGTH = struct.Struct("<Q4x")  # a TFRecord starts with its length and the length's checksum
_OVERHEAD = _LENGTH.size + 4  # ... and ends with the checksum of the data
_CACHE_FROM = 100_000  # records; scanning fewer is quicker than explaining a stale cache

Instructions = Sequence[tfds.core.utils.shard_utils.FileInstruction]


@dataclasses.dataclass(eq=False, kw_only=True)
class TfdsSource(Source):
    """One split of a prepared TFDS data set, a part or a union: "train[:90%]", "train+test"."""

    split: str
    features: tfds.features.FeaturesDict  # image and label alone
    records: "_TfRecords | _ArrayRecords"
    chosen: tf.Tensor  # int64 [num_examples], numbers of records

    def fetch(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """See Source."""
        record = self.records.read(tf.gather(self.chosen, index))
        decoders = {"image": tfds.decode.SkipDecoding()}
        example = self.features.deserialize_example(record, decoders=decoders)
        return example["image"], tf.cast(example["label"], tf.int32)

    def fingerprint(self) -> str:
        """See Source."""
        return digest(self.records.fingerprint(), self.chosen)

    def example_id(self, index: int) -> str:
        """Returns the split and the number of the record in it."""
        return f"{self.split}:{int(self.chosen[index])}"


def open_tfds(dataset: ConfigDict, split: str) -> TfdsSource:
    """Opens the data set `name` (or "name:version") under `root`, which is TFDS's `data_dir`.

    Nothing is downloaded or prepared, and no code of the data set is run. `train_fraction` takes
    records at random: to stratify it, all labels would have to be read.

    Args:
      dataset: the `dataset` group of the config.
      split: "train" or "eval".

    Raises:
      InputError: not prepared there, no such split, no image and label features, or labels that do
        not fit `num_classes`.
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
    features = _image_and_label(info.features, where)
    label = features["label"]
    num_classes = _num_classes(dataset, label, where)
    if info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        records = _ArrayRecords(instructions)
    elif info.file_format == tfds.core.FileFormat.TFRECORD:
        records = _TfRecords(instructions)
    else:
        raise InputError(
            f"{where} is stored as {info.file_format.value}, expected array_record or tfrecord; "
            "prepare it again in one of these"
        )
    fraction = dataset.train_fraction if split == "train" else 1
    chosen = fixed_fraction(np.zeros(len(records)), fraction)
    return TfdsSource(
        description=f"TFDS {where}, {name}",
        num_examples=len(chosen),
        num_classes=num_classes,
        class_names=tuple(label.names) if num_classes == label.num_classes else (),
        split=name,
        features=features,
        records=records,
        chosen=tf.constant(chosen, tf.int64),
    )


def _open_builder(dataset: ConfigDict) -> tfds.core.DatasetBuilder:
    name, root = dataset.name, dataset.root or None
    if not name:
        raise InputError("config.dataset.name is empty, expected a TFDS name or name:version")
    try:
        # Not tfds.builder: it prefers the installed code's version over the one that is on disk.
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=root)
    except ValueError:  # includes tfds.core.DatasetNotFoundError
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
    return tfds.features.FeaturesDict({name: found[name] for name in wanted})


def _num_classes(dataset: ConfigDict, label: tfds.features.ClassLabel, where: str) -> int:
    wanted, found = dataset.num_classes, label.num_classes
    if not (wanted or found):
        raise InputError(f"{where} does not say how many classes it has; set dataset.num_classes")
    if wanted and found and found > wanted:
        raise InputError(
            f"config.dataset.num_classes is {wanted}, but {where} has {found} classes; set "
            f"{found}, or 0 to infer it"
        )
    return wanted or found


class _ArrayRecords:
    """Records of ArrayRecord files, through their own random-access reader."""

    def __init__(self, instructions: Instructions) -> None:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self._instructions = instructions
        self._source = ArrayRecordDataSource(instructions)

    def __len__(self) -> int:
        return len(self._source)

    def fingerprint(self) -> str:
        """Returns a digest of the names, the sizes and the used parts of the files."""
        return digest(
            *(
                f"{os.path.basename(part.filename)} {tf.io.gfile.stat(part.filename).length} "
                f"{part.skip} {part.take}"
                for part in self._instructions
            )
        )

    def read(self, index: tf.Tensor) -> tf.Tensor:
        """Returns the serialised example, a scalar string."""
        record = tf.numpy_function(lambda i: self._source[int(i)], [index], tf.string)
        return tf.ensure_shape(record, ())


class _TfRecords:
    """Records of TFRecord files, by their offsets, which one scan of the headers finds."""

    def __init__(self, instructions: Instructions) -> None:
        files = [part.filename for part in instructions]
        offsets = _record_offsets(files, [part.examples_in_shard for part in instructions])
        tables = []
        for number, (part, ends) in enumerate(zip(instructions, offsets, strict=True)):
            bounds = ends[part.skip : part.skip + part.take + 1]
            columns = np.broadcast_arrays(number, bounds[:-1], bounds[1:], ends[-1])
            tables.append(np.stack(columns, axis=1))
        self._files = tf.constant(files)
        self._table = tf.constant(np.concatenate(tables), tf.int64)  # file, begin, end, file size

    def __len__(self) -> int:
        return self._table.shape[0]

    def fingerprint(self) -> str:
        """Returns a digest of the names of the files, and where in them the records are."""
        names = [os.path.basename(file.decode()) for file in self._files.numpy()]
        return digest("\n".join(names), self._table)

    def read(self, index: tf.Tensor) -> tf.Tensor:
        """Returns the serialised example, a scalar string."""
        file, begin, end, size = tf.unstack(tf.gather(self._table, index))
        # The only TensorFlow kernel that reads at an offset, on any file system it knows.
        record = tf.data.FixedLengthRecordDataset(
            tf.gather(self._files, file),
            record_bytes=end - begin - _OVERHEAD,
            header_bytes=begin + _LENGTH.size,
            footer_bytes=size - end + 4,
            buffer_size=end - begin,
        )
        return record.get_single_element()


def _record_offsets(files: Sequence[str], counts: Sequence[int]) -> list[np.ndarray]:
    """Returns for every file the offsets of its records and its size, int64 [count + 1].

    Large scans are remembered in the user's cache folder.
    """
    cache = None
    if sum(counts) >= _CACHE_FROM:
        stats = [tf.io.gfile.stat(file) for file in files]
        key = digest(*(f"{f} {s.length} {s.mtime_nsec}" for f, s in zip(files, stats, strict=True)))
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        cache = home / "deit_jax" / f"tfrecord_offsets_{key}.npy"
        if cache.is_file():
            return np.split(np.load(cache), np.cumsum([count + 1 for count in counts])[:-1])
    with ThreadPoolExecutor(32) as pool:  # the time goes into waiting for the disk
        offsets = list(pool.map(_scan, files, counts))
    if cache is not None:
        partial = cache.with_suffix(f".{os.getpid()}.partial")
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                np.save(file, np.concatenate(offsets))
            partial.replace(cache)
        except OSError:  # a read-only or full home costs the next start a scan, nothing else
            partial.unlink(missing_ok=True)
    return offsets


def _scan(file: str, count: int) -> np.ndarray:
    """Returns the offsets of the records of a TFRecord file and its size, int64 [count + 1]."""
    try:
        size = tf.io.gfile.stat(file).length
        offsets = [0]
        # GFile reads half a megabyte at every seek: right for a bucket, wasteful on a disk.
        local = os.path.isfile(file)
        with open(file, "rb", 0) if local else tf.io.gfile.GFile(file, "rb") as records:
            while offsets[-1] + _OVERHEAD <= size:
                records.seek(offsets[-1])
                (length,) = _LENGTH.unpack(records.read(_LENGTH.size))
                offsets.append(offsets[-1] + _OVERHEAD + length)
    except (OSError, tf.errors.OpError) as error:
        raise InputError(f"{file}: cannot be read ({error})") from None
    if offsets[-1] != size or len(offsets) != count + 1:
        raise InputError(
            f"{file}: {len(offsets) - 1} records in {size} bytes, expected {count} complete ones; "
            "the file is damaged or cut short: copy or prepare it again"
        )
    return np.asarray(offsets, np.int64)
