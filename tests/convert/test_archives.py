"""Damage inside of a file that can still be read: bits, sizes, NaN and infinity."""

import collections
import contextlib
import io
import json
import struct
import zipfile

import numpy as np
import pytest
import safetensors.numpy
import torch

from deit_jax import trees
from deit_jax.convert import from_torch
from deit_jax.errors import InputError
from tests.convert.conftest import command, numpy_state, save, timm_twin
from tests.refusal import refusal


@pytest.fixture(scope="module")
def state():
    return numpy_state(timm_twin("deit_testing"))


def _repacked(source, change, compression=zipfile.ZIP_STORED):
    """Writes the archive again, its entries as `change` returns them, with CRCs that are right."""
    with zipfile.ZipFile(source) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(source, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(name, change(name, content))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_a_flipped_bit_of_an_archive_is_noticed(tmp_path, state, name):
    """Nothing can notice one in the numbers of .safetensors; in its header, sizes and names can."""
    sound = save(tmp_path / f"sound{name[1:]}", state).read_bytes()
    expected = trees.flat(from_torch.read(tmp_path / f"sound{name[1:]}").variables.params)
    rng, outcomes = np.random.default_rng(0), collections.Counter()
    end = len(sound) if name == "a.pth" else 8 + struct.unpack("<Q", sound[:8])[0]
    for _ in range(30):
        content = bytearray(sound)
        content[rng.integers(end)] ^= 1 << int(rng.integers(8))
        (tmp_path / name).write_bytes(content)
        try:
            found = trees.flat(from_torch.read(tmp_path / name).variables.params)
        except InputError:
            outcomes["refused"] += 1
        else:
            assert all(np.array_equal(found[leaf], array) for leaf, array in expected.items())
            outcomes["harmless"] += 1
    assert outcomes["refused"] >= 20, outcomes


def test_entries_of_another_size(tmp_path, state):
    """torch maps as many bytes as the tensor needs, whosever they are."""
    path = save(tmp_path / "a.pth", state)
    names = [name for name in zipfile.ZipFile(path).namelist() if "/data/" in name]
    for wrong in (lambda x: x[:-4], lambda x: x[:-4] + bytes(8)):
        save(path, state)
        _repacked(path, lambda name, x, wrong=wrong: wrong(x) if name == names[3] else x)
        line = refusal(from_torch.read, path)
        assert f"{path}: not a readable PyTorch file (its entry {names[3]} has" in line
    save(path, state)
    _repacked(path, lambda _, x: x, zipfile.ZIP_DEFLATED)  # packed again by another program
    assert "not a readable PyTorch file" in refusal(from_torch.read, path)
    save(path, state)
    _repacked(path, lambda _, x: x)
    assert from_torch.read(path).info.name == "deit_testing"


def test_sizes_in_old_files(tmp_path, state):
    path = save(tmp_path / "old.pth", state)
    sound = path.read_bytes()
    size = state["head.weight"].size  # of one storage, before its content
    place = sound.rindex(struct.pack("<q", size) + state["head.weight"].tobytes()[:64])
    for wrong in (size - 1, size + 1, 2**62):
        path.write_bytes(sound[:place] + struct.pack("<q", wrong) + sound[place + 8 :])
        assert "not a readable PyTorch file" in refusal(from_torch.read, path)


def test_sizes_in_safetensors(tmp_path, state):
    path = save(tmp_path / "a.safetensors", state)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    for change in ({"shape": [63]}, {"dtype": "F16"}, {"data_offsets": [0, 256]}):
        header = json.loads(content[8 : 8 + length])
        header["norm.bias"] |= change
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
        assert "not a readable .safetensors file" in refusal(from_torch.read, path)


def test_an_archive_without_crc_is_read(tmp_path, state):
    torch.serialization.set_crc32_options(False)
    try:
        path = save(tmp_path / "a.pth", state)
    finally:
        torch.serialization.set_crc32_options(True)
    assert from_torch.read(path).info.name == "deit_testing"


def test_tensors_of_every_type_and_views_have_their_sizes(tmp_path):
    """Two tensors in one storage, half precision, bfloat16, and a counter beside them."""
    module = timm_twin("regnety_testing")
    state = module.state_dict()
    whole = torch.cat([state["s1.b1.conv1.bn.weight"], state["s1.b1.conv1.bn.bias"]])
    half = len(whole) // 2
    state["s1.b1.conv1.bn.weight"], state["s1.b1.conv1.bn.bias"] = whole[:half], whole[half:]
    state["head.fc.bias"] = state["head.fc.bias"].bfloat16()
    state["head.fc.weight"] = state["head.fc.weight"].half()
    torch.save(state, tmp_path / "a.pth")
    assert from_torch.read(tmp_path / "a.pth").info.name == "regnety_testing"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite(tmp_path, state, refused, value):
    """Refused in both directions, unless it is asked for."""
    wrong = state["norm.bias"].copy()
    wrong[5] = value
    source = save(tmp_path / "a.safetensors", state | {"norm.bias": wrong})
    line = refused("convert", source, tmp_path / "model")
    assert "norm.bias has 1 values that are not finite, of 64" in line
    assert "--allow_nonfinite" in line
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert command("convert", source, tmp_path / "model", "--allow_nonfinite") == 0
    assert "note: norm.bias has 1 values that are not finite" in out.getvalue()

    back = tmp_path / "b.safetensors"
    line = refused("export-torch", tmp_path / "model", back, "--format", "timm")
    assert "norm.bias has 1 values that are not finite" in line
    more = ("--format", "timm", "--allow_nonfinite")
    assert command("export-torch", tmp_path / "model", back, *more) == 0
    np.testing.assert_array_equal(safetensors.numpy.load_file(back)["norm.bias"], wrong)
