"""Recognises files that hold no weights: what a download or a clone leaves in their place."""

import codecs
import re
import zipfile
from pathlib import Path

from deit_jax import storage
from deit_jax.convert.pickles import MAGIC

START = 512  # bytes that tell most kinds
_MOST_JSON = 2**26
_OTHER = "convert the PyTorch or .safetensors weights"
_NAMED_WRONG = "a PyTorch file by its content; rename it to end with .pth"
_KINDS = {
    rb"version https://git-lfs": "a Git LFS pointer, not the file itself; run git lfs pull",
    rb"(?:\xef\xbb\xbf)?\s*(?i:<!doctype|<html|<head|<body|<\?xml|<error|<script|<!--)": (
        "a web page; download the file itself"
    ),
    rb"\x93NUMPY": "a NumPy array, not weights by name",
    rb"\x89HDF": f"an HDF5 file, as Keras writes it; {_OTHER}",
    rb"\xff\xd8\xff|\x89PNG|GIF8|II[*+]\0|MM\0[*+]|BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0"
    rb"|RIFF.{4}WEBP|.{4}ftyp(?:avi|hei|mif)|P[1-6]\s": "a picture",
    rb"%PDF": "a PDF document",
    rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|.{257}ustar|\x28\xb5\x2f\xfd|Rar!|\x04\x22\x4d\x18": (
        "a compressed archive; unpack it"
    ),
    rb"#!": "a script",
    rb"GGUF": f"a GGUF file, as llama.cpp has it; {_OTHER}",
    rb".{4}TFL3": f"a TensorFlow Lite file; {_OTHER}",
    rb"\x08[\x03-\x0f][\x12\x3a\x42]": f"an ONNX file; {_OTHER}",
    rb"\x08\x01[\x12\"]|\x0a..?\x0a.[^\0]{1,60}?\x12.(?:Placeholder|Const|VarHandleOp)": (
        f"a TensorFlow model; {_OTHER}"
    ),
    rb"model_checkpoint_path": f"the list of a TensorFlow checkpoint; {_OTHER}",
    rb"PAR1|ARROW1|ORC|Obj\x01": "a table of data, not weights",
    rb"SQLite format 3": "a data base, not weights",
    rb"\x7fELF|MZ|\xcf\xfa\xed\xfe|\xca\xfe\xba\xbe": "a program, not weights",
    rb"MATLAB 5": f"a MATLAB file; {_OTHER}",
    rb"OggS|ID3|fLaC|RIFF.{4}(?:WAVE|AVI )|.{4}ftyp|\x1aE\xdf\xa3": "sound or video",
    rb"[\x80-\x8f\xde\xdf].{0,8}(?:[\xa0-\xbf]|\xd9.)(?:params|batch_stats|model|opt_state|step)": (
        f"a file of msgpack, as Flax wrote it; {_OTHER}"
    ),
    rb"\xff\xfe|\xfe\xff": "text, not weights",
    rb"\0{64}": "empty space that was reserved for a download; download it again",
}


def recognise(path: Path, start: bytes) -> str | None:
    """Returns what a file is that holds no weights, and what to do; None where it may hold some.

    Args:
      path: the file.
      start: its first START bytes, or all.
    """
    if not start:
        return "an empty file; download it again"
    if start[4:9] == b"\0\0\0\0{":
        return None  # .safetensors, whose length may look like any kind
    for pattern, what in _KINDS.items():
        if re.match(pattern, start, re.DOTALL):
            return what
    if start[:1] in (b"{", b"["):
        return _json(path)
    if start.startswith(b"PK"):
        return _archive(path)
    if MAGIC in start[:64]:
        return _NAMED_WRONG if path.suffix == ".safetensors" else None
    if re.match(rb"\x80[\x02-\x05]", start):
        return (
            "a pickle that torch.save did not write, and loading one could execute code; save the "
            "model's state_dict() with torch.save, where you trust the file"
        )
    if _is_index_of_tensorflow(path):
        return f"the index of a TensorFlow checkpoint; {_OTHER}"
    if _is_text(start):
        line = start.decode("utf-8", "ignore").strip().partition("\n")[0][:30]
        return f"text, not weights; it begins with {line!a}"
    if path.suffix == ".safetensors":
        return None  # of which its library says more
    return f"neither a PyTorch nor a .safetensors file; it begins with {start[:8].hex(' ')}"


def _archive(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # a damaged one, of which torch says more
        return None
    files = {name.rpartition("/")[2] for name in names}
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive, as the JAX ViTs come; convert the PyTorch weights"
    if "constants.pkl" in files:
        return "a TorchScript program, which would run; save the state_dict() of its model"
    if "model.weights.h5" in files:
        return f"a Keras file; {_OTHER}"
    if "[Content_Types].xml" in files:
        return "a document of an office program"
    if "data.pkl" not in files:
        return f"a zip archive of {names[0][:80]}; unpack it" if names else "an empty zip archive"
    return _NAMED_WRONG if path.suffix == ".safetensors" else None


def _json(path: Path) -> str:
    if path.stat().st_size > _MOST_JSON:
        return "text, not weights"
    try:
        content = storage.parse_json(path.read_bytes())
    except ValueError:
        return "text, not weights"
    if isinstance(content, dict) and "weight_map" in content:
        return "the index of weights in several files; keep its name, NAME.index.json"
    return "a JSON file, not weights"


def _is_index_of_tensorflow(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(file.seek(0, 2) - 8, 0))
        return file.read() == b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"


def _is_text(start: bytes) -> bool:
    """Whether bytes are UTF-8 of signs that print; the last one may be cut."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return all(sign.isprintable() or sign in "\t\n\r\f\ufeff" for sign in text)
