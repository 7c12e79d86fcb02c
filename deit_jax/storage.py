"""Paths of files and folders: on disks, and gs:// in buckets of Google Cloud Storage.

A path on a disk is a pathlib.Path. That in a bucket is an etils.epath.Path, with the same methods:
Orbax takes it, and writes arrays there through TensorStore.
"""

import contextlib
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from deit_jax.errors import InputError

# Through gcsfs. Else etils takes TensorFlow's driver for it wherever TensorFlow is installed: two
# ways, of which that one cannot be tested without a real bucket.
os.environ.setdefault("EPATH_USE_TF", "false")

from etils import epath

if TYPE_CHECKING:
    import fsspec
    import tensorstore

Path = pathlib.Path | epath.Path

_MOST_READS = 1 << 14
_MOST_DEPTH = 100  # of JSON
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def path_of(text: str | os.PathLike, *parts: str) -> Path:
    """Returns the absolute path of a file or folder; a leading ~ is the user's home.

    Args:
      text: a path on a disk or gs://BUCKET/NAME.
      parts: names below it.

    Raises:
      InputError: another scheme, such as s3://, or gcsfs is missing.
    """
    text = os.fspath(text)
    scheme = _SCHEME.match(text)
    if scheme is None:
        return pathlib.Path(os.path.abspath(os.path.expanduser(text)), *parts)
    if scheme[1] != "gs":
        raise InputError(
            f"{text}: {scheme[0]} is not supported, expected a path on a disk or gs://BUCKET/NAME; "
            "mount that storage, or copy the files"
        )
    _connect()
    return epath.Path(text, *parts)


@functools.cache
def _connect() -> None:
    """Prepares gcsfs, once."""
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError("gs:// needs the package gcsfs; pip install 'deit-jax[gcs]'")
    import fsspec

    # What it remembers of a folder hides what other processes have written since.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False


def _bucket() -> "fsspec.AbstractFileSystem":
    import fsspec

    _connect()
    return fsspec.filesystem("gcs")


@functools.cache
def objects(bucket: str) -> "tensorstore.KvStore":
    """Opens a bucket with TensorStore, which reads in C++ threads: many reads wait at a time."""
    import tensorstore

    # `input.read_threads` says how many do; TensorStore's own limit is 32, or 640 images a second
    # where a read takes 50 ms.
    context = tensorstore.Context({"gcs_request_concurrency": {"limit": _MOST_READS}})
    return tensorstore.KvStore.open(f"gs://{bucket}/", context=context).result()


def check_name(path: Path) -> None:
    """Raises InputError for a folder in which Orbax writes arrays that nobody can read.

    It takes brackets and backslashes of the path for a pattern when it merges what the processes
    have written, finds nothing, and leaves a checkpoint without index. In a bucket it takes * and ?
    for patterns, too, and the path for an address that ends at # and ?: all checkpoints below would
    share one place.
    """
    if found := re.search(r"[\[\]\\#?*]" if is_remote(path) else r"[\[\]\\]", os.fspath(path)):
        raise InputError(
            f"{path} cannot hold checkpoints or models: Orbax cannot read what it writes below a "
            f"name with {found[0]}; choose another"
        )


def is_remote(path: str | os.PathLike) -> bool:
    """Returns whether a path is in a bucket."""
    return os.fspath(path).startswith("gs://")


def list_bucket(folder: str) -> list[tuple[str, bool]]:
    """Returns the names below a folder of a bucket, and which of them are folders.

    Raises:
      OSError: it cannot be listed.
    """
    entries = _bucket().ls(folder, detail=True)
    named = [(entry["name"].rstrip("/"), entry["type"] == "directory") for entry in entries]
    own = folder.removeprefix("gs://").rstrip("/")
    # What web consoles make for an empty folder is an object of the folder's own name.
    return [(name.rpartition("/")[2], is_folder) for name, is_folder in named if name != own]


def replace_text(path: Path, text: str) -> None:
    """Writes a file in one atomic step, which a bucket does by itself."""
    if is_remote(path):
        path.write_text(text)
        return
    partial = path.with_name(f"{path.name}.tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # else a crash of the machine may leave the name without content
    partial.replace(path)


def read_bytes(path: Path) -> bytes:
    """Reads a small file at once, also while another process writes it again.

    Raises:
      FileNotFoundError: there is none.
    """
    return _bucket().cat_file(os.fspath(path)) if is_remote(path) else path.read_bytes()


def parse_json(content: str | bytes) -> Any:
    """Returns what a JSON text says.

    Raises:
      ValueError: it is no JSON, or nested so deep that what reads it would recurse too far.
    """
    deep = ValueError(f"nested more than {_MOST_DEPTH} deep")
    try:
        content = json.loads(content)
    except RecursionError:
        raise deep from None
    level = [content]
    for _ in range(_MOST_DEPTH):
        inner = (
            x.values() if isinstance(x, dict) else x for x in level if isinstance(x, dict | list)
        )
        level = list(itertools.chain.from_iterable(inner))
    if any(isinstance(x, dict | list) for x in level):
        raise deep
    return content


def create(path: Path, data: bytes) -> bool:
    """Writes a file that nobody has; False where there is one. Of many who try, one succeeds."""
    try:
        if is_remote(path):
            _bucket().pipe_file(os.fspath(path), data, mode="create")
        else:
            with path.open("xb") as file:  # O_EXCL, which NFS has, too
                file.write(data)
    except FileExistsError:  # perhaps ours: the answer was lost, and the request sent again
        return read_bytes(path) == data
    return True


def rewrite(path: Path, mark: bytes, data: bytes) -> bool:
    """Writes again a file that holds `mark`; False where there is none, or one without it.

    Another file, or one that takes its place in between, stays as it is.
    """
    try:
        if is_remote(path):
            bucket, _, name = os.fspath(path).removeprefix("gs://").partition("/")
            found = objects(bucket).read(name).result()
            if mark not in found.value:
                return False
            # Does nothing where the object is no longer the one that was read.
            objects(bucket).write(name, data, if_equal=found.stamp.generation).result()
            return True
        with path.open("r+b") as file:
            if mark not in file.read():
                return False
            file.seek(0)
            file.write(data)
            return True
    except FileNotFoundError:
        return False


def remove_file(path: Path) -> None:
    """Removes a file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        _bucket().rm_file(os.fspath(path)) if is_remote(path) else path.unlink()


def exists(path: Path) -> bool:
    """Returns whether something is there, also a link that leads nowhere."""
    return path.exists() if is_remote(path) else os.path.lexists(path)


def remove_folder(path: Path) -> None:
    """Removes a folder with all that is in it, if it is there."""
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.rmtree()


@contextlib.contextmanager
def uploaded(path: Path) -> Iterator[pathlib.Path]:
    """Gives the place of a file to write: itself, or one that is copied to it at the end."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder, path.name)
        yield copy
        _copy(copy, path)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[pathlib.Path]:
    """Gives the place of a folder to write, which appears at `path` when it is whole, or never."""
    if not is_remote(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    beside = None if is_remote(path) else path.parent
    with tempfile.TemporaryDirectory(dir=beside, prefix=f".{path.name}.") as folder:
        fresh = pathlib.Path(folder, "new")
        yield fresh
        if is_remote(path):
            copy_files(fresh, path)
        else:
            fresh.rename(path)


def copy_files(source: Path, folder: Path) -> None:
    """Copies a file, or all files of a folder, into a folder; each appears there complete."""
    folder.mkdir(parents=True, exist_ok=True)
    files = source.iterdir() if source.is_dir() else [source]
    for file in sorted(file for file in files if file.is_file()):
        part = folder / file.name if is_remote(folder) else folder / f"{file.name}.part"
        _copy(file, part)
        if part.name != file.name:
            part.replace(folder / file.name)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, 2**23)
