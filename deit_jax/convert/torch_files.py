"""Reads and writes `.pth` and `.safetensors` files; pickles that would execute code are rejected.

torch is imported only where a `.pth` is read or written; `.safetensors` do without it.
"""

import contextlib
import functools
import importlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from deit_jax import storage
from deit_jax.convert import archives, foreign, pickles, shards, wrappers
from deit_jax.convert.mapping import COUNTER
from deit_jax.errors import InputError, brief
from deit_jax.models.info import ModelInfo

_INFO = "deit_jax"  # where a file we wrote keeps the model's description
_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".tar")

_Entries = dict[str, Callable[[], np.ndarray]]  # reads each tensor of a file, by its name


def read(
    path: str | os.PathLike, *, weights: str = "raw", notes: list[str] | None = None
) -> tuple[dict[str, np.ndarray], ModelInfo | None]:
    """Reads a state dict.

    Args:
      path: `.safetensors`, or anything that `torch.save` wrote: a state dict, or a checkpoint of a
        training program that contains one; also one of several files, or their index.
      weights: which of a training checkpoint: "raw" or "ema".
      notes: gets what a person should know, a line each.

    Returns:
      The tensors by name, float32 whatever floating-point type they were (`.pth` files are mapped
      into memory rather than read), and the model's description where we wrote the file.

    Raises:
      InputError: the file is missing or damaged, holds no state dict, or would execute code.
    """
    path, notes = Path(path), [] if notes is None else notes
    entries: _Entries = {}
    info, chosen = None, False
    for file, names in shards.files_of(path, notes).items():
        here, info, chosen = _read_file(file, weights, notes)
        if missing := [name for name in names if name not in here]:
            raise InputError(f"{file}: {missing[0]} is not in it, although the index says so")
        entries |= here
    names = wrappers.select(entries, weights, str(path), notes, chosen=chosen)
    tensors = {name: entries[key]() for name, key in names.items()}
    if info is None:
        return tensors, None
    try:
        return tensors, ModelInfo.from_json(storage.parse_json(info))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: entry {_INFO!r} is damaged ({brief(error)})") from error


def _read_file(path: Path, weights: str, notes: list[str]) -> tuple[_Entries, Any, bool]:
    """Returns the tensors of one file, its description, and whether they are the `weights`."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            start = file.read(foreign.START)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({brief(error)})") from error
    if what := foreign.recognise(path, start):
        raise InputError(f"{path} is {what}")
    # By content: hubs and mirrors rename files.
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        return *_read_safetensors(path), False
    return _read_torch(path, weights, notes)


def _read_safetensors(path: Path) -> tuple[_Entries, Any]:
    def tensor(key: str) -> np.ndarray:
        with _parsing(path):
            return _float32(file.get_tensor(key), key, path)

    with _parsing(path):
        file = safetensors.safe_open(path, framework="numpy")
        metadata = file.metadata() or {}
        return {key: functools.partial(tensor, key) for key in file.keys()}, metadata.get(_INFO)  # noqa: SIM118


@contextlib.contextmanager
def _parsing(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a parser of untrusted bytes: any type may come
        raise InputError(
            f"{path}: not a readable .safetensors file ({brief(error)}); download it again"
        ) from error


def _read_torch(path: Path, weights: str, notes: list[str]) -> tuple[_Entries, Any, bool]:
    torch = _import_torch(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is odd about a foreign file, our error says
            content = pickles.torch_load(path, torch)
            archives.check(path, torch)
    except InputError:
        raise
    except pickles.CodeError as error:
        raise InputError(
            f"{path}: rejected, since loading it could execute code (it asks for {error}); save "
            "the model's state_dict() alone, where you trust the file"
        ) from error
    except Exception as error:  # a parser of untrusted bytes: any type may come
        raise InputError(
            f"{path}: not a readable PyTorch file ({brief(error)}); download it again"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, expected a state dict")
    if isinstance(content, pickles.Inert) and not content:
        raise InputError(
            f"{path}: holds a pickled {type(content).__name__}, not a state dict; it is not "
            "loaded, as that would run code: save model.state_dict()"
        )
    state, chosen = wrappers.state_dict(content, weights, str(path), notes)
    if odd := [key for key in state if not isinstance(key, str)]:
        kind = type(odd[0]).__name__
        raise InputError(
            f"{path}: has a name that is a {kind}; save the model's state_dict() alone"
        )
    entries = {
        key: functools.partial(_from_torch, tensor, key, path, torch)
        for key, tensor in state.items()
    }
    return entries, content.get(_INFO), chosen


def _import_torch(path: Path) -> ModuleType:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise InputError(
            f"{path}: reading or writing this needs PyTorch (pip install 'deit-jax[torch]'); "
            ".safetensors files do not"
        ) from error


def _from_torch(tensor: Any, key: str, path: Path, torch: ModuleType) -> np.ndarray:
    if not isinstance(tensor, torch.Tensor):
        raise InputError(
            f"{path}: has {key!r:.60}, a {type(tensor).__name__}, where names with tensors are "
            "expected; save the model's state_dict() alone, or under 'model' or 'state_dict'"
        )
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise InputError(
            f"{path}: {key} claims {tensor.nbytes:,} bytes, the file has "
            f"{tensor.untyped_storage().nbytes():,} for it; save contiguous tensors"
        )
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()  # NumPy has no such type
    try:
        array = tensor.detach().numpy()
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{path}: {key} cannot be read ({brief(error)})") from error
    return _float32(array, key, path)


def _float32(array: np.ndarray, key: str, path: Path) -> np.ndarray:
    if key.endswith(COUNTER):
        return array
    if array.dtype.kind == "f" or array.dtype.name == "bfloat16":
        with np.errstate(over="ignore"):  # a float64 beyond float32 is found as not finite later
            return array.astype(np.float32, copy=False)
    raise InputError(f"{path}: {key} has dtype {array.dtype}, expected floating-point weights")


def write(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    *,
    info: ModelInfo | None = None,
    container: str | None = None,
) -> None:
    """Writes a state dict; the file appears only when it is complete.

    Args:
      path: `.safetensors`, or one of `.pth`, `.pt`, `.bin` for PyTorch's own format.
      tensors: C-contiguous arrays.
      info: kept in the file where its format has room for it: beside the state dict in a
        container, and in the metadata of safetensors.
      container: the key that the state dict gets, as "model" in the reference's files; None
        writes the bare dict. PyTorch's own format only.

    Raises:
      InputError: another suffix, torch is missing, or the disk refuses.
    """
    path = storage.path_of(path)
    check_suffix(path)
    described = {} if info is None else {_INFO: json.dumps(info.to_json(), ensure_ascii=False)}
    with _replacing(path) as part:
        if path.suffix == ".safetensors":
            metadata = {"format": "pt"} | described
            safetensors.numpy.save_file(dict(tensors), part, metadata=metadata)
        else:
            torch = _import_torch(path)
            content = {key: torch.from_numpy(np.array(array)) for key, array in tensors.items()}
            torch.save(content if container is None else {container: content} | described, part)


def check_suffix(path: storage.Path) -> None:
    """Raises InputError for a file name that `write` knows no format for, or has no torch for."""
    known = (".safetensors", *_TORCH_SUFFIXES)
    if path.suffix not in known:
        raise InputError(f"{path}: suffix {path.suffix!r}, expected one of {', '.join(known)}")
    if path.suffix != ".safetensors":
        _import_torch(path)


@contextlib.contextmanager
def _replacing(path: storage.Path) -> Iterator[Path]:
    """Yields a temporary file that takes the place of `path` when the block succeeds."""
    if storage.is_remote(path):
        with storage.uploaded(path) as part:
            yield part
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} cannot be written ({brief(error)})") from error
