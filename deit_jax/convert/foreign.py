"""Recognises files that hold no weights: what a download or a clone leaves in their place."""

import json
import re
import zipfile
from pathlib import Path

START = 512  # bytes that tell most kinds
_TEXTS = {
    rb"version https://git-lfs": "a Git LFS pointer, not the file itself; run git lfs pull",
    rb"\s*(?i:<!doctype html|<html|<head|<\?xml)": "a web page; download the file itself",
    rb"\x93NUMPY": "a NumPy array, not weights by name",
    rb"\x89HDF": "an HDF5 file, as Keras writes it; convert the PyTorch or .safetensors weights",
    rb"\xff\xd8\xff|\x89PNG|GIF8": "a picture",
    rb"%PDF": "a PDF document",
    rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|ustar": "a compressed archive; unpack it",
    rb"#!": "a script",
}


def recognise(path: Path, start: bytes) -> str | None:
    """Returns what a file is that holds no weights, and what to do; None where it may hold some.

    Args:
      path: the file.
      start: its first START bytes, or all.
    """
    if not start:
        return "an empty file; download it again"
    for pattern, what in _TEXTS.items():
        if re.match(pattern, start):
            return what
    if start[:1] in (b"{", b"["):
        return _json(path)
    if start.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except Exception:  # a damaged one, of which torch says more
            return None
        if names and all(name.endswith(".npy") for name in names):
            return "a NumPy archive, as the JAX ViTs come; convert the PyTorch weights"
        if not any(name.endswith("data.pkl") for name in names):
            return f"a zip archive of {names[0] if names else 'nothing'}; unpack it"
    return None


def _json(path: Path) -> str:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return "text, not weights"
    if isinstance(content, dict) and "weight_map" in content:
        return "the index of weights in several files; convert a model whose weights are one file"
    return "a JSON file, not weights"
