"""Files that hold no weights: the line says what each is, under any name."""

import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image

from deit_jax.convert import from_torch, torch_files
from tests.convert.conftest import numpy_state, save, timm_twin
from tests.refusal import refusal

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:%d\nsize 346319111\n"


def _zipped(*names, content=b"x"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, content)
    return buffer.getvalue()


def _tar():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights/model.pth"))
    return buffer.getvalue()


def _numpy(write, *arrays, **named):
    buffer = io.BytesIO()
    write(buffer, *arrays, **named)
    return buffer.getvalue()


def _picture(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind)
    return buffer.getvalue()


def _torch(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def _onnx(producer):
    return b"\x08\x08\x12" + bytes([len(producer)]) + producer + b"\x1a\x051.2.3:\xff\x01"


KINDS = {  # words, and files of that kind
    "an empty file": [b""],
    "git lfs pull": [LFS % 0, LFS % 1 + b"\n", LFS.replace(b"git-lfs", b"git-lfs ") % 2],
    "a web page": [
        b"<!DOCTYPE html><html>Sign in</html>",
        b"\n\n  <html lang='en'>",
        b"<HEAD><title>404</title>",
        b"\xef\xbb\xbf<!doctype HTML>",
        b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
        b"<!-- proxy --><html>",
    ],
    "a JSON file": [b'{"num_classes": 1000}', b"[1, 2]", b"{}", b'{"error": "Not Found"}'],
    "the index of weights": [json.dumps({"metadata": {}, "weight_map": {"a": "b"}}).encode()],
    "text, not weights": [
        b"[" * 100_000,
        b'{"a": ',
        b"# A model card\n\nlicense: mit\n",
        b"Entry not found",
        b"---\nlicense: apache-2.0\n---\n",
        "Zugriff verweigert: für Gäste\n".encode() * 20,
        b"\xff\xfeE\0r\0r\0o\0r\0",
        b"epoch,loss\n0,1.5\n",
    ],
    "a NumPy archive": [
        _numpy(np.savez, a=np.zeros(3)),
        _numpy(np.savez_compressed, a=np.zeros(3), b=np.ones(2)),
        _zipped("Transformer/encoder_norm/bias.npy", "cls.npy"),
    ],
    "a NumPy array": [
        _numpy(np.save, np.zeros((3, 4))),
        _numpy(np.save, np.array([{"a": 1}], object)),
        _numpy(np.save, np.zeros(3, np.float16)),
    ],
    "an HDF5 file": [b"\x89HDF\r\n\x1a\n" + bytes(90)],
    "a Keras file": [_zipped("metadata.json", "config.json", "model.weights.h5")],
    "a zip archive of": [_zipped("readme.txt"), _zipped("deit/model.bin", "deit/config.json")],
    "an empty zip archive": [_zipped()],
    "a TorchScript program": [_zipped("m/data.pkl", "m/constants.pkl", "m/code/x.py")],
    "a compressed archive": [
        b"\x1f\x8b\x08" + bytes(90),
        zlib.compress(b"x" * 99, wbits=31),
        b"BZh91AY&SY" + bytes(20),
        b"\xfd7zXZ\0" + bytes(20),
        b"7z\xbc\xaf\x27\x1c" + bytes(20),
        b"\x28\xb5\x2f\xfd" + bytes(20),
        _tar(),
    ],
    "a picture": [*map(_picture, ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"))],
    "a PDF document": [b"%PDF-1.7\n"],
    "a script": [b"#!/bin/sh\nwget x\n", b"#!/usr/bin/env python3\n"],
    "a pickle that torch.save did not write": [
        *(pickle.dumps([1, 2], protocol) for protocol in (2, 3, 4, 5)),
        pickle.dumps({"w": np.ones(3)}),
    ],
    "an ONNX file": [_onnx(b"pytorch"), _onnx(b"tf2onnx"), b"\x08\x07\x3a\xff\x01\x0a\x05graph"],
    "a TensorFlow model": [
        b"\x08\x01\x12\xb4\x02\x0a\x02\x10\x01",
        b"\x0a\x28\x0a\x05input\x12\x0bPlaceholder*",
    ],
    "a TensorFlow Lite file": [b"\x1c\0\0\0TFL3" + bytes(40)],
    "the list of a TensorFlow checkpoint": [b'model_checkpoint_path: "model.ckpt-9"\n'],
    "the index of a TensorFlow checkpoint": [bytes(30) + b"\x01\x57\xfb\x80\x8b\x24\x75\x47\xdb"],
    "a GGUF file": [b"GGUF\x03\0\0\0" + bytes(40)],
    "a file of msgpack": [b"\x81\xa6params\x82\xa3cls\xc7\x11\x01"],
    "a table of data": [b"PAR1\x15\x04", b"ARROW1\0\0\xff"],
    "a data base": [b"SQLite format 3\0\x10\0"],
    "a program": [b"\x7fELF\x02\x01\x01" + bytes(20), b"MZ\x90\0\x03\0\0\0"],
    "sound or video": [b"OggS\0\x02" + bytes(20), b"RIFF\x24\0\0\0WAVEfmt "],
    "reserved for a download": [bytes(4096)],
}
FILES = [(words, content) for words, files in KINDS.items() for content in files]


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors", ""])
@pytest.mark.parametrize("number", range(len(FILES)))
def test_the_line_says_what_a_file_is(tmp_path, number, suffix):
    words, content = FILES[number]
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    line = refusal(from_torch.read, path)
    assert line.startswith(f"{path} is ")
    assert words in line


def test_there_are_two_hundred_of_them():
    assert len(FILES) * 4 >= 200
    assert len(KINDS) >= 12


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a_old.pth", "a.bin"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_what_a_broken_off_download_left(tmp_path, name, share):
    source = save(tmp_path / name, numpy_state(timm_twin("deit_testing")))
    source.write_bytes(source.read_bytes()[: int(source.stat().st_size * share)])
    line = refusal(from_torch.read, source)
    assert "not a readable" in line
    assert "download it again" in line
    assert ("its end is missing" in line) == (name in ("a.pth", "a.bin"))


@pytest.mark.parametrize("suffix", [".pth", ".bin", ""])
def test_bytes_of_no_known_kind(tmp_path, suffix):
    """As the values of a TensorFlow checkpoint are, which have no header."""
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(np.random.default_rng(0).standard_normal(99).astype(np.float32).tobytes())
    assert "neither a PyTorch nor a .safetensors file" in refusal(from_torch.read, path)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("content", [[torch.ones(3)], torch.ones(3), "text", 5])
def test_what_holds_no_dictionary(tmp_path, content, old):
    path = tmp_path / "a.pth"
    path.write_bytes(_torch(content, _use_new_zipfile_serialization=not old))
    assert f"holds a {type(content).__name__}, expected a state dict" in refusal(
        from_torch.read, path
    )


@pytest.mark.parametrize("old", [False, True])
def test_pytorch_files_of_another_name(tmp_path, old):
    path = tmp_path / "a.safetensors"
    path.write_bytes(_torch({"a": torch.ones(3)}, _use_new_zipfile_serialization=not old))
    assert "a PyTorch file by its content; rename it" in refusal(from_torch.read, path)


@pytest.mark.parametrize("length", [b"MZ", b"#!", b"BZh", b"P5 ", b"\x1f\x8b\x08", b"\x08\x01\x12"])
def test_lengths_of_headers_that_look_like_other_kinds(tmp_path, length):
    """A .safetensors file begins with the length of its header."""
    plain = safetensors.numpy.save({"pos_embed": np.ones(3, np.float32)})
    size = int.from_bytes(plain[:8], "little")
    wanted = int.from_bytes(length, "little")
    header = plain[8 : 8 + size].ljust(wanted)
    for suffix in ("safetensors", "bin"):
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(struct.pack("<Q", wanted) + header + plain[8 + size :])
        assert [*torch_files.read(path)[0]] == ["pos_embed"]
