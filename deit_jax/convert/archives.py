"""Checks that the tensors in an archive of `torch.save` are whole: torch.load maps any bytes."""

import zipfile
from pathlib import Path
from types import ModuleType
from typing import IO

from deit_jax.convert.pickles import Inert, Unpickler, entries


class _Storages(Unpickler):
    """Collects which entry each storage is in, and how many elements of which type it has."""

    def __init__(self, file: IO[bytes]):
        super().__init__(file, encoding="latin1")
        self.found: set[tuple[str, str, int]] = set()

    def find_class(self, module: str, name: str) -> type:
        """Returns a stand-in: nothing has a meaning here but the names of storages."""
        return type(name, (Inert,), {})

    def persistent_load(self, saved: tuple) -> Inert:
        """Remembers a storage."""
        _, kind, key, _, count = saved
        self.found.add((str(key), kind.__name__, int(count)))
        return Inert()


def check(path: Path, torch: ModuleType) -> None:
    """Compares a zip archive with its CRCs, and every tensor's entry with the tensor's size.

    Args:
      path: a file that `pickles.torch_load` has read; others than archives pass.
      torch: the module.

    Raises:
      ValueError: an entry is not what was written.
    """
    if not zipfile.is_zipfile(path):
        return  # torch compares the sizes in its older files
    with zipfile.ZipFile(path) as archive:
        found = {entry.filename: entry for entry in entries(archive)}
        (pickled,) = (name for name in found if name.rpartition("/")[2] == "data.pkl")
        storages = _Storages(archive.open(pickled))
        storages.load()
        for key, kind, count in storages.found:
            name = pickled.removesuffix("data.pkl") + f"data/{key}"
            dtype = getattr(getattr(torch, kind, None), "dtype", torch.uint8)
            expected, entry = count * dtype.itemsize, found[name]
            if (entry.file_size, entry.compress_type) != (expected, zipfile.ZIP_STORED):
                raise ValueError(
                    f"its entry {name} has {entry.compress_size:,} bytes, where its tensors need "
                    f"{expected:,}"
                )
        if wrong := archive.testzip():
            raise ValueError(f"its entry {wrong} does not agree with its CRC")
