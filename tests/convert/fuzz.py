"""Mutates weight files and converts each: it must succeed, or end with one line and no folder.

python tests/convert/fuzz.py --files=2000 [--seed=0]

Prints how many succeeded and how many were refused; exits with 1 at the first traceback, with its
number.
"""

import argparse
import collections
import contextlib
import io
import os
import shutil
import struct
import sys
import tempfile
import traceback
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np  # noqa: E402

from deit_jax.convert import from_torch, torch_files  # noqa: E402
from tests.convert.conftest import command, numpy_state, save, timm_twin  # noqa: E402


def originals() -> dict[str, bytes]:
    """The sound files, by suffix-bearing names."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("deit_testing_distilled", "deit3_testing", "regnety_testing"):
            arrays = numpy_state(timm_twin(name, num_classes=3))
            for kind in (".safetensors", ".pth", "_old.pth"):
                container = None if "old" in kind else "model"
                save(Path(folder, name + kind), arrays, container=container)
            # As our own converter writes it, with the model's description.
            info = from_torch.from_tensors(arrays, what=name).info
            torch_files.write(f"{folder}/{name}_ours.safetensors", arrays, info=info)
            torch_files.write(f"{folder}/{name}_ours.pth", arrays, info=info, container="model")
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def header_of(name: str, content: bytes) -> tuple[int, int]:
    """Where the structure of a file is: the bytes around its numbers."""
    if name.endswith(".safetensors"):
        return 0, 8 + struct.unpack("<Q", content[:8])[0]
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entry = next(e for e in archive.infolist() if e.filename.endswith("data.pkl"))
            if len(content) % 2:  # either the pickle, or the directory at the end
                return entry.header_offset, entry.header_offset + entry.file_size
            return archive.start_dir, len(content)
    return 0, 20_000


def mutate(name: str, content: bytes, rng: np.random.Generator) -> bytes:
    """One of several kinds of damage."""
    data = bytearray(content)
    start, end = header_of(name, content) if rng.random() < 0.7 else (0, len(data))
    place, length = int(rng.integers(start, end)), int(rng.integers(1, 64))
    kind = rng.integers(7)
    if kind == 0:
        data[place] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del data[place:]
    elif kind == 2:  # one number becomes another in the text of a header
        digits = [i for i in range(start, end) if 48 <= data[i] < 58] or [place]
        data[rng.choice(digits)] = int(rng.integers(48, 58))
    else:  # bytes are replaced by others or by zeros, deleted, or inserted
        stop = place if kind == 3 else place + length
        data[place:stop] = {4: b"", 5: bytes(length)}.get(int(kind), rng.bytes(length))
    return bytes(data)


def fuzz(files: int, seed: int) -> collections.Counter:
    """Converts that many damaged files. Raises AssertionError at the first misbehaviour."""
    sound = originals()
    rng = np.random.default_rng(seed)
    counts = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(files):
            name = list(sound)[number % len(sound)]
            path, target = Path(folder) / name, Path(folder) / "model"
            path.write_bytes(mutate(name, sound[name], rng))
            errors = io.StringIO()
            try:
                with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
                    status = command("convert", path, target)
            except BaseException as error:
                raise AssertionError(f"file {number} ({name}): {traceback.format_exc()}") from error
            if status == 0:
                assert (target / "model.json").is_file()
                shutil.rmtree(target)
            else:
                (line,) = errors.getvalue().strip().splitlines()
                assert line.startswith("error: "), f"file {number} ({name}): {line}"
            assert os.listdir(folder) == [name], f"file {number}"
            counts["converted" if status == 0 else "refused"] += 1
            path.unlink()
            if (number + 1) % 200 == 0:
                print(f"{number + 1}/{files} {dict(counts)}", flush=True)
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(dict(fuzz(arguments.files, arguments.seed)))
