"""Broken and hostile files end in one line, and never leave a half-written model folder."""

import errno
import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from deit_jax.checkpoints import model_folder
from deit_jax.convert import to_torch
from deit_jax.errors import InputError
from deit_jax.models import registry
from tests.convert.conftest import (
    command,
    numpy_state,
    random_folder,
    random_variables,
    save,
    timm_twin,
)
from tests.convert.fuzz import fuzz


@pytest.fixture(scope="module")
def state():
    return numpy_state(timm_twin("deit_testing"))


@pytest.fixture
def converted(tmp_path, refused):
    """Runs convert, which has to refuse; returns its line."""
    return lambda source, *more: refused("convert", source, tmp_path / "model", *more)


def full(value, *shape, dtype=np.float32):
    return np.full(shape, value, dtype)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm.bias": None}, "missing norm.bias"),
        ({"extra.weight": full(1, 3)}, "unexpected extra.weight"),
        ({"blocks.1.mlp.fc1.bias": full(1, 3)}, "blocks.1.mlp.fc1.bias has shape (3,)"),
        ({"norm.bias": full(np.nan, 64)}, "norm.bias has 64 values"),
        ({"norm.bias": full(np.inf, 64)}, "norm.bias has 64 values"),
        ({"norm.bias": full(1, 64, dtype=np.int32)}, "norm.bias has dtype int32"),
        ({"": None}, "0 tensors"),
        ({"": None, "something": full(1, 3)}, "something"),
        ({"blocks.3.": None}, "embed_dim 64, depth 3"),
        ({"pos_embed": full(1, 1, 60, 64)}, "60 position embeddings"),
        ({"pos_embed": full(1, 60, 64)}, "pos_embed has shape (60, 64)"),
        ({"head": None}, "head.weight"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_wrong_tensors(tmp_path, state, converted, suffix, change, words):
    """None takes away all keys with this start."""
    gone = tuple(key for key, value in change.items() if value is None)
    tensors = {key: value for key, value in state.items() if not key.startswith(gone)}
    tensors |= {key: value for key, value in change.items() if value is not None}
    line = converted(save(tmp_path / f"weights{suffix}", tensors))
    assert f"weights{suffix}" in line
    assert words in line


class _Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("form", ["zip", "old", "pickle", "among tensors"])
def test_pickles_that_would_execute_code_are_rejected(tmp_path_factory, tmp_path, converted, form):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    source, attack = tmp_path / "weights.pth", _Attack(elsewhere / "run")
    if form == "pickle":
        source.write_bytes(pickle.dumps(attack))
    else:
        state = {"model": timm_twin("deit_testing").state_dict(), "args": attack}
        content = state if form == "among tensors" else attack
        torch.save(content, source, _use_new_zipfile_serialization=form != "old")
    assert "could execute code" in converted(source)
    assert not any(elsewhere.iterdir())
    # The attack is a real one: plain pickle falls for it.
    pickle.loads(pickle.dumps(attack))
    assert (elsewhere / "run").is_dir()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "old.pth"])
def test_truncated_files(tmp_path, state, converted, name, share):
    source = save(tmp_path / name, state)
    source.write_bytes(source.read_bytes()[: int(source.stat().st_size * share)])
    line = converted(source)
    assert name in line
    assert "not a readable" in line


def test_a_header_that_promises_too_much(tmp_path, converted):
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", 2**62) + b'{"a": 1}')
    assert "a.safetensors" in converted(tmp_path / "a.safetensors")


@pytest.mark.parametrize("counter", [np.float32(np.nan), np.ones(2, np.int64), np.int32(1)])
def test_damaged_counters(tmp_path, converted, counter):
    name, tensors = "stem.bn.num_batches_tracked", numpy_state(timm_twin("regnety_testing"))
    damaged = save(tmp_path / "a.safetensors", tensors | {name: np.asarray(counter)})
    assert name in converted(damaged)


def test_a_tensor_that_claims_more_than_it_has(tmp_path, state, converted):
    tensors = {key: torch.from_numpy(value) for key, value in state.items()}
    tensors["head.weight"] = torch.zeros(1, 64).expand(10**11, 64)
    torch.save(tensors, tmp_path / "a.pth")
    assert "head.weight claims" in converted(tmp_path / "a.pth")


def test_wrong_names_and_places(tmp_path, state, converted, refused):
    source, target = save(tmp_path / "a.safetensors", state), tmp_path / "model"
    (tmp_path / "folder").mkdir()
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    for flags, words in {
        ("--model", "deit_testin"): "did you mean deit_testing",
        ("--model", "regnety_testing"): "regnety_testing",
        ("--model", "deit3_testing"): "deit3_testing",
        ("--weights", "ema"): "EMA",
        ("--class_names", tmp_path / "names.txt"): "2 class names for 7 classes",
        **{("--num_classes", value): value for value in ("0", "-3", str(10**12))},
        **{("--image_size", value): value for value in ("0", "-3", str(10**12))},
    }.items():
        assert words in converted(source, *flags)
    assert "nowhere.pth" in converted(tmp_path / "nowhere.pth")
    assert "model.safetensors" in converted(tmp_path / "folder")
    assert "x" * 300 in refused("convert", source, tmp_path / ("x" * 300))

    assert command("convert", source, target) == 0
    stamp = (target / "model.json").stat().st_mtime_ns
    assert "--overwrite" in converted(source)
    assert (target / "model.json").stat().st_mtime_ns == stamp
    assert command("convert", source, target, "--overwrite") == 0
    assert "not a model folder" in refused("convert", source, tmp_path / "folder")
    assert "model folder of deit-jax already" in refused("convert", target, tmp_path / "new")
    assert "is a run of deit-jax already; name it as it is" in refused("convert", tmp_path, "new")


def test_export_refuses_in_one_line(tmp_path, refused):
    model = random_folder(tmp_path / "model", "deit3_testing")
    out = tmp_path / "out.safetensors"
    assert "not a model folder" in refused("export-torch", tmp_path / "no", out, "--format", "timm")
    assert ".npz" in refused("export-torch", model, tmp_path / "out.npz", "--format", "timm")
    assert "LayerScale" in refused("export-torch", model, out, "--format", "hf")
    out.write_text("precious")
    assert "--overwrite" in refused("export-torch", model, out, "--format", "timm")
    assert out.read_text() == "precious"


def test_a_full_disk_leaves_nothing(tmp_path, state, monkeypatch, capsys):
    target = tmp_path / "model"

    def save_half(self, path, tree):
        path.mkdir()
        (path / "half").write_bytes(b"x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_folder.ocp.PyTreeCheckpointer, "save", save_half)
    assert command("convert", save(tmp_path / "a.safetensors", state), target) == 1  # it may pass
    line = f"error: {target} cannot be written (No space left on device)\n"
    assert capsys.readouterr().err == line
    assert not target.exists()


@pytest.mark.parametrize("error", [ValueError("ours"), KeyError("ours"), TypeError("ours")])
def test_a_bug_in_writing_is_no_line(tmp_path, state, monkeypatch, error):
    def broken(*_):
        raise error

    monkeypatch.setattr(model_folder, "write_model", broken)
    with pytest.raises(type(error), match="ours"):
        command("convert", save(tmp_path / "a.safetensors", state), tmp_path / "model")


def test_mutated_files():
    """`python tests/convert/fuzz.py --files=2000` is the long form."""
    counts = fuzz(files=30, seed=1)
    assert counts["refused"] >= 12, counts
    assert counts["converted"] >= 1, counts


def described(state, folder, **changes):
    """A file that carries a description, with some of it changed."""
    fields = random_variables("deit_testing")[1].to_json() | changes
    path = folder / "described.safetensors"
    safetensors.numpy.save_file(state, path, {"format": "pt", "deit_jax": json.dumps(fields)})
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"overrides": [["depth", 1_000_000_000]]},
        {"overrides": [["depth", 256]]},
        {"overrides": [["depth", "x"]]},
        {"overrides": [["num_heads", 0]]},
        {"overrides": [["patch_size", 0]]},
        {"overrides": [["embed_dim", None]]},
        {"overrides": [["rngs", 1]]},
        {"overrides": [["name", "deit_testing"]]},
        {"overrides": [["w0", 24]]},
        {"overrides": 5},
        {"class_names": ["cat"]},
        {"mean": [float("nan"), 0, 0]},
        {"std": [0, 1, 1]},
        {"crop_ratio": 1.6},
        {"num_classes": 10**12},
        {"name": "deit_tasting"},
        {"name": None},
        {"surprise": 1},
    ],
)
def test_a_lying_description(tmp_path, state, converted, changes):
    assert "described.safetensors" in converted(described(state, tmp_path, **changes))


@pytest.mark.parametrize("name", ["deit_testing", "regnety_testing"])
def test_a_description_of_256_blocks_builds_none(tmp_path, monkeypatch, refused, name):
    folder = random_folder(tmp_path / "model", name)
    fields = json.loads((folder / "model.json").read_text()) | {"overrides": [["depth", 256]]}
    fields.pop("digest", None)
    (folder / "model.json").write_text(json.dumps(fields))
    source = tmp_path / "a.safetensors"
    description = random_variables(name)[1].to_json() | {"overrides": [["depth", 256]]}
    metadata = {"deit_jax": json.dumps(description)}
    safetensors.numpy.save_file(numpy_state(timm_twin(name)), source, metadata)
    monkeypatch.setattr(model_folder, "build", lambda *_, **__: pytest.fail("was built"))
    blocks = registry.model_options(name)["depth"]
    found = refused("export-torch", folder, tmp_path / "b.safetensors", "--format", "timm")
    assert f"says depth 256, but the weights have {blocks} blocks" in found
    assert f"says depth 256, the tensors are of {blocks}" in refused(
        "convert", source, tmp_path / "b"
    )


def test_a_true_description(tmp_path, state):
    source = described(state, tmp_path, source="a test")
    assert command("convert", source, tmp_path / "model") == 0
    assert model_folder.read_info(tmp_path / "model").source == "a test"


def test_nothing_of_other_people_is_replaced(tmp_path, refused):
    """A run folder has a config.json too; names like ours may be somebody's."""
    run = tmp_path / "run"
    random_folder(run / "model", "deit_testing")
    (run / "config.json").write_text("{}")
    for name in ("out.new", "out.old", "hf.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("yes")
    hf, out = ("--format", "hf", "--overwrite"), tmp_path / "out"
    assert "did not write" in refused("export-torch", run, run, *hf)
    for _ in range(2):  # the second replaces the first
        assert command("export-torch", run, tmp_path / "hf", *hf) == 0
        assert command("convert", tmp_path / "hf", out, "--overwrite") == 0
    assert command("export-torch", run, out / "b.safetensors", "--format", "timm") == 0
    assert "holds the source" in refused("convert", out / "b.safetensors", out, "--overwrite")
    for name in ("out.new", "out.old", "hf.new"):
        assert (tmp_path / name / "precious").read_text() == "yes"
    names = {"run", "out", "hf", "out.new", "out.old", "hf.new"}
    assert {file.name for file in tmp_path.iterdir()} == names


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "as a disk says")])
def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch, error):
    model, folder, plain = (
        random_folder(tmp_path / "model", "deit_testing"),
        tmp_path / "hf",
        Path.rename,
    )
    to_torch.write(model, folder, "hf")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def rename(path, target):
        if path.name == "new":
            raise error
        return plain(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises((KeyboardInterrupt, InputError)):
        to_torch.write(model, folder, "hf")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        *(("config.json", text, "config.json") for text in (b"{", b"[]", b"\xff\xfe")),
        ("config.json", b'{"id2label": 5}', "config.json"),
        ("config.json", None, "larger than any such file"),
        ("config.json", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("config.json", {"model_type": "beit"}, "model_type is 'beit'"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 1e999}}, "damaged"),
        ("preprocessor_config.json", {"image_mean": [1, 2]}, "damaged"),
        ("preprocessor_config.json", {"crop_size": 400}, "crop_size 400 is larger"),
    ],
)
def test_odd_folders_of_transformers(tmp_path, converted, file, content, words):
    folder = tmp_path / "hf"
    to_torch.write(random_folder(tmp_path / "sound", "deit_testing"), folder, "hf")
    if content is None:  # a sparse file of a gigabyte
        os.truncate(folder / file, 2**30)
        assert words in converted(folder)
        return
    if isinstance(content, dict):
        sound = json.loads((folder / file).read_text()) | {"do_center_crop": True}
        sound.pop("deit_jax", None)
        content = json.dumps(sound | content).encode()
    (folder / file).write_bytes(content)
    assert words in converted(folder)
