"""Reads and writes `.pth` and `.safetensors` files; pickles that would execute code are rejected.

torch is imported only where a `.pth` is read or written; `.safetensors` do without it.
"""

import argparse
import contextlib
import importlib
import json
import os
import pathlib
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from deit_jax import storage
from deit_jax.convert import foreign
from deit_jax.convert.mapping import COUNTER
from deit_jax.errors import InputError, brief
from deit_jax.models.info import ModelInfo

_INFO = "deit_jax"  # where a file we wrote keeps the model's description
_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".tar")
_CONTAINERS = {"raw": ("model", "state_dict"), "ema": ("model_ema", "state_dict_ema")}
# Of DistributedDataParallel and torch.compile, and what Lightning's modules call their model.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.")

# What training checkpoints hold besides tensors: their options, and NumPy numbers.
_HARMLESS = [
    argparse.Namespace,
    pathlib.PosixPath,
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
    np.dtypes.Int64DType,
    np.float64(0).__reduce__()[0],  # numpy's function that makes a scalar
]


def read(
    path: str | os.PathLike, *, weights: str = "raw"
) -> tuple[dict[str, np.ndarray], ModelInfo | None]:
    """Reads a state dict.

    Args:
      path: `.safetensors`, or anything that `torch.save` wrote: a state dict, or a training
        checkpoint of the reference or timm that contains one.
      weights: which of a training checkpoint: "raw" or "ema".

    Returns:
      The tensors by name, float32 whatever floating-point type they were (`.pth` files are mapped
      into memory rather than read), and the model's description where we wrote the file.

    Raises:
      InputError: the file is missing or damaged, holds no state dict, or would execute code.
    """
    path = Path(path)
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
        if weights != "raw":
            raise InputError(f"{path}: a .safetensors file holds one set of weights, not an EMA")
        tensors, info = _read_safetensors(path)
    else:
        tensors, info = _read_torch(path, weights)
    while tensors and (prefix := _common_prefix(tensors)):  # one may wrap the other
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    if info is None:
        return tensors, None
    try:
        return tensors, ModelInfo.from_json(json.loads(info))
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: entry {_INFO!r} is damaged ({brief(error)})") from error


def _common_prefix(names: Iterable[str]) -> str:
    """Returns the wrapper that all names begin with, "" without one."""
    first = next(iter(names)).partition(".")[0] + "."
    return first if first in _WRAPPERS and all(name.startswith(first) for name in names) else ""


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], Any]:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {key: _float32(file.get_tensor(key), key, path) for key in file.keys()}  # noqa: SIM118
    except InputError:
        raise
    except Exception as error:  # a parser of untrusted bytes: any type may come
        raise InputError(
            f"{path}: not a readable .safetensors file ({brief(error)}); download it again"
        ) from error
    return tensors, metadata.get(_INFO)


def _read_torch(path: Path, weights: str) -> tuple[dict[str, np.ndarray], Any]:
    torch = _import_torch(path)
    try:
        # Only zip files, which torch has written since 1.6, can be mapped.
        mapped = zipfile.is_zipfile(path)
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is odd about a foreign file, our error says
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a parser of untrusted bytes: any type may come
        raise InputError(f"{path}: {_why_not(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, expected a state dict")
    tensors = {}
    for key, tensor in _state_dict(content, weights, path).items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise InputError(
                f"{path}: has {key!r:.60}, a {type(tensor).__name__}, where names with tensors are "
                "expected; save the model's state_dict() alone, or under 'model' or 'state_dict'"
            )
        tensors[key] = _from_torch(tensor, key, path, torch)
    return tensors, content.get(_INFO)


def _import_torch(path: Path) -> ModuleType:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise InputError(
            f"{path}: reading or writing this needs PyTorch (pip install 'deit-jax[torch]'); "
            ".safetensors files do not"
        ) from error


def _why_not(error: Exception) -> str:
    text = str(error)
    if "Unsupported" in text or "weights_only" in text.lower() or "GLOBAL" in text:
        name = text.partition("GLOBAL ")[2].split(" ")[0]
        asks = f"it asks for {name}" if name else "it holds more than tensors and plain data"
        return (
            f"rejected, since loading it could execute code ({asks}); save the model's "
            "state_dict() alone, where you trust the file"
        )
    return f"not a readable PyTorch file ({brief(error)}); download it again"


def _state_dict(content: dict, weights: str, path: Path) -> Mapping[str, Any]:
    """Finds the state dict inside what `torch.load` returned."""
    for name in _CONTAINERS[weights]:
        if isinstance(content.get(name), dict):
            inner = content[name]
            nested = [key for key in _CONTAINERS["raw"] if isinstance(inner.get(key), dict)]
            return inner[nested[0]] if nested else inner
    if weights == "ema":
        listed = ", ".join(repr(key) for key in list(content)[:5])
        raise InputError(f"{path}: no EMA ('model_ema' or 'state_dict_ema') in it; it has {listed}")
    return content


def _from_torch(tensor: Any, key: str, path: Path, torch: ModuleType) -> np.ndarray:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise InputError(f"{path}: {key} is no plain dense tensor; save a float32 state_dict()")
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
