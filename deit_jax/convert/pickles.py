"""Unpickles what `torch.save` wrote without running any of its code, in bounded memory.

A pickle names functions and calls them. Here only the names that make tensors mean something; every
other one gets a stand-in that takes whatever it is called with and holds nothing: options, paths,
NumPy's numbers and random states, callbacks. Python's own functions are refused: nothing but an
attack, or a whole program in place of its weights, asks for those.

torch.load takes this module in place of Python's `pickle`; its own `weights_only` knows a few names
of NumPy alone, and reads a pickle of any size.
"""

import _compat_pickle
import io
import os
import pickle
import pickletools
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from deit_jax.errors import InputError

MAGIC = b"\xfc\x9cF\xf9 j\xa8P\x19"  # in the first bytes of what torch before 1.6 wrote
_MOST_BYTES = 2**26  # of a pickle without its tensors; one of a thousand tensors has a hundred kB
_MOST_OPERATIONS = 2_000_000  # each may take 200 bytes of memory
_HARMLESS = {  # of Python's own modules, which else are refused
    *("argparse", "collections", "_collections", "datetime", "decimal", "enum", "fractions"),
    *("ipaddress", "pathlib", "random", "_random", "types", "uuid", "zoneinfo", "functools"),
    *("logging", "time", "re", "string", "dataclasses", "typing", "numbers", "_codecs", "copyreg"),
}
_BUILTINS = {
    *("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list"),
    *("object", "range", "set", "slice", "str", "tuple", "type", "Ellipsis", "NotImplemented"),
    "getattr",  # by which Python 3.11 pickles members of an Enum
}


_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class CodeError(pickle.UnpicklingError):
    """A pickle asks for what could execute code; the name of that is its text."""


class Inert(dict):
    """Stands for an object of another program; keeps the items of a dictionary and nothing else."""

    def __init__(self, *_: object, **__: object):
        super().__init__()

    def __new__(cls, *_: object, **__: object) -> "Inert":
        """Takes what the other class would take."""
        return super().__new__(cls)

    def __call__(self, *_: object, **__: object) -> "Inert":
        """Stands for what a function or a class returns."""
        return Inert()

    def __setstate__(self, state: object) -> None:
        """Drops the state."""

    def append(self, value: object) -> None:
        """Drops what a list or a set would take in."""

    def extend(self, values: object) -> None:
        """Drops what a list would take in."""

    add = append
    __hash__ = object.__hash__  # may be a key
    __eq__ = object.__eq__
    __ne__ = object.__ne__


class _Function:
    """A function that a pickle may call and cannot change."""

    __slots__ = ("_function",)

    def __init__(self, function: Any):
        object.__setattr__(self, "_function", function)

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setattr__(self, name: str, value: object) -> None:
        raise CodeError(name)

    def __setstate__(self, state: object) -> None:
        raise CodeError(str(self._function))


def _tensor(storage: Any, offset: int, size: tuple, stride: tuple, *_: object) -> Any:
    return sys.modules["torch"]._utils._rebuild_tensor(storage, offset, size, stride)


def _bytes() -> Any:
    return sys.modules["torch"].uint8


def _dictionary(items: Any = (), *_: object) -> Inert:
    found = Inert()
    found.update(items)
    return found


def _same(value: Any, *_: object) -> Any:
    return value


def _of_a_subclass(function: Any, _: object, arguments: tuple, *__: object) -> Any:
    return function(*arguments)


_MEANT = {
    "torch._utils._rebuild_tensor": _Function(_tensor),
    "torch._utils._rebuild_tensor_v2": _Function(_tensor),
    "torch._utils._rebuild_parameter": _Function(_same),
    "torch._utils._rebuild_parameter_with_state": _Function(_same),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _Function(_same),
    "torch._tensor._rebuild_from_type": _Function(_of_a_subclass),
    "torch._tensor._rebuild_from_type_v2": _Function(_of_a_subclass),
    "collections.OrderedDict": _Function(_dictionary),
}


class Unpickler(pickle.Unpickler):
    """Python's Unpickler, which finds what has a meaning here, and stand-ins for all else."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns what a name stands for; imports nothing."""
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        full = f"{module}.{name}"
        if full in _MEANT:
            return _MEANT[full]
        if module == "builtins":
            harmless = name in _BUILTINS or name.endswith(("Error", "Warning", "Exception"))
        else:
            top = module.partition(".")[0]
            harmless = top in _HARMLESS or top not in sys.stdlib_module_names
        if not harmless:
            raise CodeError(full)
        # A storage of bytes is asked for its dtype.
        return type(name, (Inert,), {"dtype": _bytes()} if "Storage" in name else {})


def load(file: IO[bytes], **options: Any) -> Any:
    """Unpickles, as `pickle.load`."""
    return Unpickler(file, **options).load()


def torch_load(path: Path, torch: ModuleType) -> Any:
    """Returns what torch.load does, with tensors as views of the file where it can be mapped.

    Raises:
      InputError: reading it would take much memory.
      CodeError: it asks for what could execute code.
      Exception: it is damaged; of any type.
    """
    zipped = zipfile.is_zipfile(path)  # which torch has written since 1.6, and can be mapped
    if zipped:
        _check_archive(path)
    else:
        with path.open("rb") as file:
            if file.read(2) == b"PK":
                raise ValueError("its end is missing, as of a download that broke off")
        if tarfile.is_tarfile(path):  # of torch before 0.1.10, which it would unpack
            raise InputError(f"{path} is a tar archive; save it again with a newer PyTorch")
        with path.open("rb") as file:
            for _ in range(5):  # magic number, version, system, content, keys of the storages
                _check_pickle(file, path)
    forced = os.environ.pop(_FORCE, None)  # which bars every unpickler but torch's
    try:
        return torch.load(
            path,
            map_location="cpu",
            weights_only=False,
            mmap=zipped,
            pickle_module=sys.modules[__name__],
            encoding="latin1",  # of Python 2, whose strings may be bytes
        )
    finally:
        if forced is not None:
            os.environ[_FORCE] = forced


def entries(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """Returns the entries, whose CRCs are not compared where torch was told to compute none."""
    found = archive.infolist()
    if not any(entry.CRC for entry in found):
        for entry in found:
            entry.CRC = None
    return found


def _check_archive(path: Path) -> None:
    """Refuses entries besides the tensors that are large once they are unpacked."""
    with zipfile.ZipFile(path) as archive:
        for entry in entries(archive):
            folder, _, name = entry.filename.rpartition("/")
            if entry.file_size > _MOST_BYTES and not folder.endswith("data"):
                raise InputError(
                    f"{path}: its entry {name!a:.40} has {entry.file_size:,} bytes, which no "
                    "weights need; save the model's state_dict() alone"
                )
            if name == "data.pkl":
                _check_pickle(io.BytesIO(archive.read(entry)), path)


def _check_pickle(file: IO[bytes], path: Path) -> None:
    """Reads a pickle's operations without acting on them; leaves the file behind it."""
    bounded = _Bounded(file, path)
    for count, (operation, value, _) in enumerate(pickletools.genops(bounded)):
        # Python makes room for as many remembered objects as the number of one says.
        distant = operation.name.endswith("PUT") and int(value) > count
        if count > _MOST_OPERATIONS or distant:
            raise bounded.refusal()


class _Bounded:
    """A file of which no more than `_MOST_BYTES` can be read, and no more be asked for."""

    def __init__(self, file: IO[bytes], path: Path):
        self._file, self._path, self._left = file, path, _MOST_BYTES

    def read(self, size: int) -> bytes:
        """Reads that many bytes."""
        self._left -= size
        if self._left < 0:
            raise self.refusal()
        return self._file.read(size)

    def readline(self) -> bytes:
        """Reads a line."""
        line = self._file.readline(self._left + 1)
        self._left -= len(line)
        if self._left < 0:
            raise self.refusal()
        return line

    def refusal(self) -> InputError:
        """Says what is too much."""
        return InputError(
            f"{self._path}: holds more than {_MOST_BYTES:,} bytes or {_MOST_OPERATIONS:,} "
            "operations besides its tensors; save the model's state_dict() alone"
        )
