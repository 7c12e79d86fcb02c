"""Prepared TFDS data sets on disk, in TFRecord or ArrayRecord files, with random access."""

import hashlib
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from deit_jax.data.source import Source, frozen_random
from deit_jax.errors import InputError
from deit_jax.trees import digest

_LENGTH = struct.Struct("<Q4x")  # a TFRecord starts with its length and the length's checksum
_OVERHEAD = _LENGTH.size + 4  # ... and ends with the checksum of the data
_CACHE_FROM = 100_000  # records; scanning fewer is quicker than explaining a stale cache


class TfdsSource(Source):
    """One split of a prepared TFDS data set, a part or a union: "train[:90%]", "train+test"."""

    def __init__(
        self,
        split: str,
        features: tfds.features.FeaturesDict,
        records: "_TfRecords | _ArrayRecords",
        chosen: np.ndarray | None,
        *,
        description: str,
        num_classes: int,
        class_names: tuple[str, ...],
    ) -> None:
        super().__init__(
            description=description,
            num_examples=len(records) if chosen is None else len(chosen),
            num_classes=num_classes,
            class_names=class_names,
            encoded=True,
        )
        self._split = split
        self._features = features
        self._records = records
        self._chosen = None if chosen is None else tf.constant(chosen, tf.int64)

    def fetch(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """See Source."""
        if self._chosen is not None:
            index = tf.gather(self._chosen, index)
        example = self._features.deserialize_example(
            self._records.read(index), decoders={"image": tfds.decode.SkipDecoding()}
        )
        return example["image"], tf.cast(example["label"], tf.int32)

    def fingerprint(self) -> str:
        """See Source."""
        chosen = "all" if self._chosen is None else self._chosen
        return digest(self._records.fingerprint(), chosen)

    def example_id(self, index: int) -> str:
        """Split and number of the record in it."""
        return f"{self._split}:{index if self._chosen is None else int(self._chosen[index])}"


def open_tfds(dataset: ConfigDict, split: str) -> TfdsSource:
    """Opens the data set `name` (or "name:version") under `root`, which is TFDS's `data_dir`.

    Nothing is downloaded or prepared, and no code of the data set is run.

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
    chosen = None
    if split == "train" and dataset.train_fraction < 1:
        count = max(1, round(dataset.train_fraction * len(records)))
        chosen = np.sort(frozen_random(0).permutation(len(records))[:count])
    return TfdsSource(
        name,
        features,
        records,
        chosen,
        description=f"TFDS {where}, {name}",
        num_classes=num_classes,
        class_names=tuple(label.names) if num_classes == label.num_classes else (),
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
    """The two features we need; the others are never parsed."""
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
    """Records of ArrayRecord files through their own random-access reader."""

    def __init__(self, instructions: Sequence[tfds.core.utils.shard_utils.FileInstruction]) -> None:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self._instructions = instructions
        self._source = ArrayRecordDataSource(instructions)

    def __len__(self) -> int:
        return len(self._source)

    def fingerprint(self) -> str:
        """Of the names, the sizes and the used parts of the files."""
        return digest(
            *(
                f"{os.path.basename(part.filename)} {tf.io.gfile.stat(part.filename).length} "
                f"{part.skip} {part.take}"
                for part in self._instructions
            )
        )

    def read(self, index: tf.Tensor) -> tf.Tensor:
        """The serialised example, a scalar string."""
        record = tf.numpy_function(lambda i: self._source[int(i)], [index], tf.string)
        return tf.ensure_shape(record, ())


class _TfRecords:
    """Records of TFRecord files by their offsets, which one scan of the headers finds."""

    def __init__(self, instructions: Sequence[tfds.core.utils.shard_utils.FileInstruction]) -> None:
        files = [instruction.filename for instruction in instructions]
        counts = [instruction.examples_in_shard for instruction in instructions]
        parts = []
        for i, offsets in enumerate(_record_offsets(files, counts)):
            first = instructions[i].skip
            bounds = offsets[first : first + instructions[i].take + 1]
            columns = (np.full(len(bounds) - 1, i), bounds[:-1], bounds[1:])
            parts.append(np.stack([*columns, np.full(len(bounds) - 1, offsets[-1])], axis=1))
        self._files = tf.constant(files)
        self._table = tf.constant(np.concatenate(parts), tf.int64)  # file, begin, end, file size

    def __len__(self) -> int:
        return self._table.shape[0]

    def fingerprint(self) -> str:
        """Of the names of the files, and where in them the records are."""
        names = [os.path.basename(file.decode()) for file in self._files.numpy()]
        return digest("\n".join(names), self._table)

    def read(self, index: tf.Tensor) -> tf.Tensor:
        """The serialised example, a scalar string."""
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
    """For every file the offsets of its records and its size; large scans are remembered."""
    if sum(counts) < _CACHE_FROM:
        return _scan_all(files, counts)
    key = hashlib.sha256()
    for file in files:
        stat = tf.io.gfile.stat(file)
        key.update(f"{file}\0{stat.length}\0{stat.mtime_nsec}\0".encode())
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = home / "deit_jax" / f"tfrecord_offsets_{key.hexdigest()[:32]}.npy"
    ends = np.cumsum([count + 1 for count in counts])
    if cache.is_file():
        return np.split(np.load(cache), ends[:-1])
    offsets = _scan_all(files, counts)
    partial = cache.with_suffix(f".{os.getpid()}.partial")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.save(file, np.concatenate(offsets))
        partial.replace(cache)
    except OSError:  # a read-only or full home costs the next start a scan, nothing else
        partial.unlink(missing_ok=True)
    return offsets


def _scan_all(files: Sequence[str], counts: Sequence[int]) -> list[np.ndarray]:
    with ThreadPoolExecutor(32) as pool:  # the time goes into waiting for the disk
        return list(pool.map(_scan, files, counts))


def _scan(file: str, count: int) -> np.ndarray:
    """Offsets int64 [count + 1] of the records of a TFRecord file, the last one its size."""
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
