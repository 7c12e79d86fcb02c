"""Weights in several files: `model.safetensors.index.json` says which tensor is in which file."""

import re
from pathlib import Path

from deit_jax import storage
from deit_jax.errors import InputError, brief

INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)")
MOST_BYTES = 2**26  # of a JSON file beside weights


def files_of(path: Path, notes: list[str]) -> dict[Path, list[str]]:
    """Returns the files that hold the weights of `path`, and the names that each has to hold.

    Args:
      path: a file with weights, one of several, or the index of several.
      notes: gets a line where more files are read than `path`.

    Raises:
      InputError: the index is damaged or missing, or a file that it names is.
    """
    shard = _SHARD.fullmatch(path.name)
    index = path.with_name(f"{shard[1]}{shard[4]}.index.json") if shard else path
    if shard and not index.is_file():
        raise InputError(
            f"{path}: number {int(shard[2])} of {int(shard[3])} files that hold the weights "
            f"together, and their index {index.name} is missing; put all of them in one folder"
        )
    if not index.name.endswith(".index.json"):
        return {path: []}
    files = _read_index(index)
    if missing := sorted(file.name for file in files if not file.is_file()):
        raise InputError(
            f"{index}: {len(missing)} of the {len(files)} files that it names are missing: "
            f"{', '.join(missing[:3])}; download them into {index.parent}"
        )
    notes.append(f"{len(files)} files are read together, as {index.name} says")
    return files


def _read_index(index: Path) -> dict[Path, list[str]]:
    files: dict[Path, list[str]] = {}
    try:
        if index.stat().st_size > MOST_BYTES:
            raise ValueError("larger than any index")
        for name, file in storage.parse_json(index.read_bytes())["weight_map"].items():
            if Path(file).name != file or file in ("", ".", ".."):
                raise ValueError(f"{file!r:.60} is not the name of a file beside it")
            files.setdefault(index.with_name(file), []).append(name)
        if not files:
            raise ValueError("it names no file")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{index}: not a readable index of weights in several files ({brief(error)}); "
            "download it again"
        ) from error
    return files
