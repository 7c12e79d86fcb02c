"""Random access to the records of TFRecord files, by the offsets that one scan of them finds."""

import contextlib
import os
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from struct import Struct
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from deit_jax import storage
from deit_jax.console import log_error
from deit_jax.data import buckets
from deit_jax.data.source import in_python
from deit_jax.errors import InputError, brief
from deit_jax.trees import digest

_LENGTH = Struct("<Q4x")  # a record starts with its length and the length's checksum
_OVERHEAD = _LENGTH.size + 4  # ... and ends with the checksum of the data
_CACHE_FROM = 100_000  # records; scanning fewer is quicker than explaining a stale cache
_SCANNERS = 32  # files at a time: the time goes into waiting for the disk
_REPORT_SECONDS = 5


class Part(NamedTuple):
    """Consecutive records of one file."""

    file: str
    count: int  # records in the file
    skip: int
    take: int


class TfRecords:
    """The records of parts of TFRecord files, numbered through; 8 bytes of memory a record."""

    def __init__(self, parts: Sequence[Part]) -> None:
        """Finds the records.

        Raises:
          InputError: a file cannot be read, is damaged, or has another number of records.
        """
        files = list(dict.fromkeys((part.file, part.count) for part in parts))
        offsets = dict(zip(files, _offsets(files), strict=True))
        bounds = [
            offsets[part.file, part.count][part.skip : part.skip + part.take + 1] for part in parts
        ]
        self._names = [os.path.basename(part.file) for part in parts]
        self._paths = [part.file for part in parts]
        self._files = tf.constant(self._paths)
        self._remote = any(storage.is_remote(part.file) for part in parts)
        self._bounds = tf.constant(np.concatenate(bounds), tf.int64)  # one more than records a part
        self._firsts = tf.constant(np.cumsum([0, *(part.take for part in parts)])[:-1], tf.int64)
        self._count = sum(part.take for part in parts)

    def __len__(self) -> int:
        return self._count

    def fingerprint(self) -> str:
        """Returns a digest of the names of the files, and where in them the records are."""
        return digest("\n".join(self._names), self._firsts, self._bounds)

    def read(self, index: tf.Tensor) -> tf.Tensor:
        """Reads a record, and nothing but it; its checksum is verified.

        Args:
          index: of the record, int64 scalar.

        Returns:
          The serialised example, a scalar string.
        """
        if self._remote:
            record = tf.numpy_function(self.read_bytes, [index], tf.string, stateful=False)
            return tf.ensure_shape(record, ())
        part = tf.searchsorted(self._firsts, index[None], side="right")[0] - 1
        place = index + tf.cast(part, tf.int64)
        begin, end = tf.gather(self._bounds, place), tf.gather(self._bounds, place + 1)
        file = tf.gather(self._files, part)
        # Of TensorFlow's readers the only one that seeks: tf.data's read all that comes before.
        records = tf.raw_ops.TFRecordDatasetV2(
            filenames=file[None],
            compression_type="",
            buffer_size=end - begin,
            byte_offsets=begin[None],
        )
        element = {"output_types": [tf.string], "output_shapes": [tf.TensorShape(())]}
        first = tf.raw_ops.TakeDataset(input_dataset=records, count=1, **element)
        (record,) = tf.raw_ops.DatasetToSingleElement(dataset=first, **element)
        return record

    def read_bytes(self, index: int) -> bytes:
        """Does as `read`, in Python."""
        if not self._remote:
            return self.read(tf.constant(index, tf.int64)).numpy()
        part = int(np.searchsorted(self._firsts, index, side="right")) - 1
        begin, end = in_python(self._bounds)[index + part : index + part + 2].tolist()
        return buckets.read_record(self._paths[part], begin, end)


def _offsets(files: Sequence[tuple[str, int]]) -> list[np.ndarray]:
    """Returns for every (file, count) the offsets of its records and its size, int64 [count + 1].

    Large scans are remembered in the user's cache folder.
    """
    total = sum(count for _, count in files)
    if total < _CACHE_FROM:
        return _scanned(files)
    with ThreadPoolExecutor(_SCANNERS) as pool:
        stats = list(pool.map(_stat, (file for file, _ in files)))
    key = digest(
        *(f"{file} {count} {stat}" for (file, count), stat in zip(files, stats, strict=True))
    )
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = home / "deit_jax" / f"tfrecord_offsets_{key}.npy"
    sizes, counts = [size for size, _ in stats], [count for _, count in files]
    offsets = _read_cache(cache, sizes, counts)
    if offsets is None:
        offsets = _scanned(files)
        _write_cache(cache, offsets)
    return offsets


def _stat(file: str) -> tuple[int, int]:
    """Returns the size and the time of change."""
    try:
        stat = storage.path_of(file).stat()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({brief(error)})") from None
    if storage.is_remote(file):
        return stat.length, stat.mtime
    return stat.st_size, stat.st_mtime_ns


def _read_cache(
    cache: Path, sizes: Sequence[int], counts: Sequence[int]
) -> list[np.ndarray] | None:
    """Returns the remembered offsets; None where there are none, or not those of such files."""
    try:
        flat = np.load(cache)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    if flat.dtype != np.int64 or flat.shape != (sum(counts) + len(counts),):
        return None
    offsets = np.split(flat, np.cumsum([count + 1 for count in counts])[:-1])
    for each, size in zip(offsets, sizes, strict=True):
        if each[0] != 0 or each[-1] != size or (np.diff(each) < _OVERHEAD).any():
            return None
    return offsets


def _write_cache(cache: Path, offsets: Sequence[np.ndarray]) -> None:
    partial = cache.with_suffix(f".{os.getpid()}.partial")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.save(file, np.concatenate(offsets))
        partial.replace(cache)
    except OSError as error:  # a read-only or full home costs the next start a scan, nothing else
        partial.unlink(missing_ok=True)
        log_error(f"note: {cache} cannot be written ({error.strerror}); the next start scans again")


def _scanned(files: Sequence[tuple[str, int]]) -> list[np.ndarray]:
    """Returns the offsets of each file; reports progress on a long scan."""
    reported = time.monotonic()
    with ThreadPoolExecutor(_SCANNERS) as pool:
        scans = [pool.submit(_scan, *file) for file in files]
        try:
            for done, scan in enumerate(as_completed(scans), 1):
                scan.result()
                if time.monotonic() - reported > _REPORT_SECONDS:
                    reported = time.monotonic()
                    log_error(f"looking for records: {done} of {len(files)} TFRecord files")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [scan.result() for scan in scans]


def _scan(file: str, count: int) -> np.ndarray:
    """Returns the offsets of the records of a TFRecord file and its size, int64 [count + 1]."""
    offsets, (size, _) = [0], _stat(file)
    try:
        with contextlib.nullcontext() if storage.is_remote(file) else open(file, "rb") as opened:
            while offsets[-1] + _OVERHEAD <= size:
                begin, end = offsets[-1], offsets[-1] + _LENGTH.size
                if opened is None:
                    header = buckets.read(file, begin, end)
                else:
                    header = os.pread(opened.fileno(), _LENGTH.size, begin)
                (length,) = _LENGTH.unpack(header)
                offsets.append(begin + _OVERHEAD + length)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({brief(error)})") from None
    if offsets[-1] != size or len(offsets) != count + 1:
        raise InputError(
            f"{file}: {len(offsets) - 1} records in {size} bytes, expected {count} complete ones; "
            "the file is damaged or cut short: copy or prepare it again"
        )
    return np.asarray(offsets, np.int64)
