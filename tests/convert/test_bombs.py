"""Files that would take memory or time by the gigabyte are refused before they do."""

import io
import pickle
import struct
import zipfile

import pytest
import torch

GIGABYTES = 3 * 10**9
_MAGIC = torch.serialization.MAGIC_NUMBER
_PROGRAM = r"""
import re, sys, time
import torch  # noqa: F401
from deit_jax.convert import from_torch, torch_files
def peak():  # getrusage's is that of the parent, where that was larger
    return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) / 1024
before, begin = peak(), time.perf_counter()
try:
    torch_files.read(sys.argv[1])
except from_torch.InputError as error:
    print(f"{peak() - before:.0f} {time.perf_counter() - begin:.2f} {error}")
"""


def _old(path, *pickles):
    """What torch before 1.6 wrote: pickles in a row; one that is a number is so many zeros."""
    with path.open("wb") as file:
        for content in (_MAGIC, 1001, {}):
            file.write(pickle.dumps(content, 2))
        for content in pickles:
            if isinstance(content, int):  # a sparse file: it takes no room
                file.seek(content, 1)
                file.truncate()
            else:
                file.write(content)


def _zip(path, data, name="data.pkl"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        if name != "data.pkl":
            archive.writestr("a/data.pkl", b"\x80\x02}.")
        with archive.open(f"a/{name}", "w") as file:
            for part in data:
                file.write(part)


_ZEROS = [bytes(10**7)] * 30
BOMBS = {
    "bytes in a row": lambda path: _old(path, b"\x8e" + struct.pack("<Q", GIGABYTES), GIGABYTES),
    "a line without end": lambda path: _old(path, b"S'", GIGABYTES),
    "a frame": lambda path: _old(path, b"\x80\x04\x95" + struct.pack("<Q", GIGABYTES), GIGABYTES),
    "a distant memory": lambda path: _old(path, b"}r" + struct.pack("<I", 2**31) + b"."),
    "many sets": lambda path: _old(path, b"\x80\x04(" + b"\x8f" * 5_000_000 + b"l."),
    "a deflated pickle": lambda path: _zip(path, [b"\x80\x02T\0\0\0\x10", *_ZEROS]),
    "deflated sets": lambda path: _zip(path, [b"\x80\x04(", b"\x8f" * 5_000_000, b"l."]),
    "a deflated byte order": lambda path: _zip(path, _ZEROS, "byteorder"),
    "a promise of storage": lambda path: torch.save(
        {"a": torch.zeros(1).expand(10**11)}, path
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_take_little_memory_and_time(tmp_path, run_python, bomb):
    path = tmp_path / "a.pth"
    BOMBS[bomb](path)
    ended = run_python("-c", _PROGRAM, path, timeout=120)
    assert ended.returncode == 0, ended.stderr[-2000:]
    (line,) = ended.stdout.splitlines()
    megabytes, seconds, message = line.split(" ", 2)
    print(bomb, megabytes, "MB", seconds, "s", message[:200])
    assert str(path) in message
    assert float(megabytes) < 300
    assert float(seconds) < 10


def test_the_bombs_are_real():
    """Python's own pickle makes a gigabyte of ten million bytes."""
    many = pickle.load(io.BytesIO(b"\x80\x04(" + b"\x8f" * 100_000 + b"l."))
    assert sum(each.__sizeof__() for each in many) > 100 * 100_000
