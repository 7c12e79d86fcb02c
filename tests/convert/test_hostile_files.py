"""Broken and hostile files end in one line, and never leave a half-written model folder."""

import json
import os
import pickle
import struct

import numpy as np
import pytest
import safetensors.numpy
import torch

from deit_jax.checkpoints import model_folder
from deit_jax.cli.main import main
from deit_jax.convert import to_torch
from tests.convert.conftest import random_variables, timm_twin
from tests.convert.fuzz import fuzz


@pytest.fixture(scope="module")
def state():
    return {key: tensor.numpy() for key, tensor in timm_twin("deit_testing").state_dict().items()}


@pytest.fixture
def refused(tmp_path, one_error_line):
    """Runs torch_to_jax, which has to refuse; returns its line."""

    def run(source, *more):
        before = sorted(tmp_path.rglob("*"))
        status = main(["convert", "--src", str(source), "--dst", str(tmp_path / "model"), *more])
        line = one_error_line(status)
        assert sorted(tmp_path.rglob("*")) == before  # no folder, not even half of one
        return line

    return run


def changed(state, **changes):
    return {**state, **{key.replace("__", "."): value for key, value in changes.items()}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "norm.bias"}, ["missing norm.bias"]),
        (lambda s: changed(s, extra__weight=np.ones(3, np.float32)), ["unexpected extra.weight"]),
        (
            lambda s: changed(s, blocks__1__mlp__fc1__bias=np.ones(3, np.float32)),
            ["blocks.1.mlp.fc1.bias has shape (3,), expected (256,)"],
        ),
        (
            lambda s: changed(s, norm__bias=np.full(64, np.nan, np.float32)),
            ["norm.bias", "64 values that are not finite"],
        ),
        (
            lambda s: changed(s, norm__bias=np.full(64, np.inf, np.float32)),
            ["norm.bias", "64 values that are not finite"],
        ),
        (lambda s: changed(s, norm__bias=np.ones(64, np.int32)), ["norm.bias", "dtype int32"]),
        (lambda s: {}, ["not recognised", "0 tensors"]),
        (lambda s: {"something": np.ones(3, np.float32)}, ["not recognised", "something"]),
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith("blocks.3.")},
            ["no registered model has embed_dim 64, depth 3"],
        ),
        (
            lambda s: changed(s, pos_embed=np.ones((1, 60, 64), np.float32)),
            ["60 position embeddings", "no square grid"],
        ),
        (
            lambda s: changed(s, pos_embed=np.ones((60, 64), np.float32)),
            ["pos_embed has shape (60, 64), expected 3 axes"],
        ),
        (lambda s: {k: v for k, v in s.items() if "head" not in k}, ["no tensor head.weight"]),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_wrong_tensors(tmp_path, state, refused, suffix, change, words):
    source = tmp_path / f"weights{suffix}"
    tensors = change(state)
    if suffix == ".pth":
        torch.save({key: torch.from_numpy(value) for key, value in tensors.items()}, source)
    else:
        safetensors.numpy.save_file(tensors, source)
    line = refused(source)
    assert all(word in line for word in [source.name, *words]), line


class _Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("form", ["zip", "old", "pickle", "among tensors"])
def test_a_file_that_would_run_code_does_not(tmp_path_factory, tmp_path, refused, form):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    source, attack = tmp_path / "weights.pth", _Attack(elsewhere / "run")
    if form == "zip":
        torch.save(attack, source)
    elif form == "old":
        torch.save(attack, source, _use_new_zipfile_serialization=False)
    elif form == "pickle":
        source.write_bytes(pickle.dumps(attack))
    else:
        torch.save({"model": timm_twin("deit_testing").state_dict(), "args": attack}, source)
    line = refused(source)
    assert "could execute code" in line
    assert not any(elsewhere.iterdir())
    # The attack is a real one: plain pickle falls for it.
    pickle.loads(pickle.dumps(attack))
    assert (elsewhere / "run").is_dir()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "old.pth"])
def test_truncated_files(tmp_path, state, refused, name, share):
    source = tmp_path / name
    if name.endswith(".pth"):
        tensors = {key: torch.from_numpy(value) for key, value in state.items()}
        torch.save(tensors, source, _use_new_zipfile_serialization=name != "old.pth")
    else:
        safetensors.numpy.save_file(state, source)
    source.write_bytes(source.read_bytes()[: int(source.stat().st_size * share)])
    line = refused(source)
    assert name in line
    assert "not a readable" in line


def test_a_header_that_promises_too_much(tmp_path, refused):
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", 2**62) + b'{"a": 1}')
    assert "not a readable .safetensors file" in refused(tmp_path / "a.safetensors")


def test_wrong_names_and_places(tmp_path, state, refused, one_error_line):
    source = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(state, source)
    assert 'unknown model "deit_testin"' in refused(source, "--model", "deit_testin")
    assert "did you mean deit_testing" in refused(source, "--model", "deit_testin")
    assert "regnety_testing" in refused(source, "--model", "regnety_testing")
    assert "deit3_testing" in refused(source, "--model", "deit3_testing")
    assert "nowhere.pth" in refused(tmp_path / "nowhere.pth")
    (tmp_path / "folder").mkdir()
    assert "model.safetensors" in refused(tmp_path / "folder")
    assert "EMA" in refused(source, "--weights", "ema")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    line = refused(source, "--class_names", str(tmp_path / "names.txt"))
    assert "2 class names for 7 classes" in line

    target = tmp_path / "model"
    assert main(["convert", "--src", str(source), "--dst", str(target)]) == 0
    stamp = (target / "model.json").stat().st_mtime_ns
    status = main(["convert", "--src", str(source), "--dst", str(target)])
    assert "--overwrite" in one_error_line(status)
    assert (target / "model.json").stat().st_mtime_ns == stamp
    assert main(["convert", "--src", str(source), "--dst", str(target), "--overwrite"]) == 0
    status = main(["convert", "--src", str(source), "--dst", str(tmp_path / "folder")])
    assert "is no model folder" in one_error_line(status)
    status = main(["convert", "--src", str(target), "--dst", str(tmp_path / "new")])
    assert "model folder of deit-jax already" in one_error_line(status)


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"id2label": 5}', b"\xff\xfe"])
def test_damaged_config_json(tmp_path, refused, damage):
    folder = tmp_path / "hf"
    model_folder.write_model(tmp_path / "sound", *random_variables("deit_testing"))
    to_torch.write(tmp_path / "sound", folder, "hf")
    (folder / "config.json").write_bytes(damage)
    line = refused(folder)
    assert "config.json" in line


def test_jax_to_torch_refuses_in_one_line(tmp_path, one_error_line):
    def run(*arguments):
        return one_error_line(main(["export-torch", *map(str, arguments)]))

    model = tmp_path / "model"
    model_folder.write_model(model, *random_variables("deit3_testing"))
    out = tmp_path / "out.safetensors"
    line = run("--src", tmp_path / "nowhere", "--dst", out, "--format", "timm")
    assert "no model folder" in line
    line = run("--src", model, "--dst", tmp_path / "out.npz", "--format", "timm")
    assert ".npz" in line
    assert ".safetensors" in line
    assert "LayerScale" in run("--src", model, "--dst", out, "--format", "hf")
    out.write_text("precious")
    assert "--overwrite" in run("--src", model, "--dst", out, "--format", "timm")
    line = run("--src", model, "--dst", model, "--format", "timm", "--overwrite")
    assert "did not write" in line
    assert out.read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out.safetensors"]


def test_a_full_disk_leaves_nothing(tmp_path, state, monkeypatch, one_error_line):
    source = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(state, source)

    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def save(self, path, tree):
            path.mkdir()
            (path / "half").write_bytes(b"x")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_folder.ocp, "PyTreeCheckpointer", Full)
    status = main(["convert", "--src", str(source), "--dst", str(tmp_path / "model")])
    assert "No space left on device" in one_error_line(status)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


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
def test_a_lying_description(tmp_path, state, refused, changes):
    source = described(state, tmp_path, **changes)
    assert source.name in refused(source)


def test_a_true_description(tmp_path, state):
    source = described(state, tmp_path, source="a test")
    assert main(["convert", "--src", str(source), "--dst", str(tmp_path / "model")]) == 0
    assert model_folder.read_info(tmp_path / "model").source == "a test"


@pytest.mark.parametrize("counter", [np.float32(np.nan), np.ones(2, np.int64), np.int32(1)])
def test_damaged_counters(tmp_path, refused, counter):
    tensors = {k: v.numpy() for k, v in timm_twin("regnety_testing").state_dict().items()}
    tensors["stem.bn.num_batches_tracked"] = np.asarray(counter)
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    assert "stem.bn.num_batches_tracked" in refused(tmp_path / "a.safetensors")


def test_a_tensor_that_claims_more_than_it_has(tmp_path, state, refused):
    tensors = {key: torch.from_numpy(value) for key, value in state.items()}
    tensors["head.weight"] = torch.zeros(1, 64).expand(10**11, 64)
    torch.save(tensors, tmp_path / "a.pth")
    assert "head.weight claims" in refused(tmp_path / "a.pth")


def test_impossible_sizes_and_places(tmp_path, state, refused):
    source = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(state, source)
    for flag in ("--num_classes", "--image_size"):
        for value in ("0", "-3", str(10**12)):
            line = refused(source, flag, value)
            assert flag in line
            assert value in line
    status = main(["convert", "--src", str(source), "--dst", str(tmp_path / ("x" * 300))])
    assert status == 2
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_nothing_of_other_people_is_replaced(tmp_path, one_error_line):
    """A run folder has a config.json too; names like ours may be somebody's."""
    run = tmp_path / "run"
    model_folder.write_model(run / "model", *random_variables("deit_testing"))
    (run / "config.json").write_text("{}")
    for name in ("out.new", "out.old", "hf.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("yes")
    hf = ["--format", "hf", "--overwrite"]
    status = main(["export-torch", "--src", str(run), "--dst", str(run), *hf])
    assert "did not write" in one_error_line(status)
    assert (run / "model" / "model.json").is_file()
    for _ in range(2):  # the second replaces the first
        assert main(["export-torch", "--src", str(run), "--dst", str(tmp_path / "hf"), *hf]) == 0
        arguments = ["--src", str(tmp_path / "hf"), "--dst", str(tmp_path / "out"), "--overwrite"]
        assert main(["convert", *arguments]) == 0
    inside = str(tmp_path / "out" / "b.safetensors")
    assert main(["export-torch", "--src", str(run), "--dst", inside, "--format", "timm"]) == 0
    status = main(["convert", "--src", inside, "--dst", str(tmp_path / "out"), "--overwrite"])
    assert "holds the source" in one_error_line(status)
    for name in ("out.new", "out.old", "hf.new"):
        assert (tmp_path / name / "precious").read_text() == "yes"
    names = {"run", "out", "hf", "out.new", "out.old", "hf.new"}
    assert {file.name for file in tmp_path.iterdir()} == names


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("config.json", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("config.json", {"model_type": "beit"}, "model_type is 'beit'"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 1e999}}, "damaged"),
        ("preprocessor_config.json", {"image_mean": [1, 2]}, "damaged"),
        ("preprocessor_config.json", {"crop_size": 400}, "crop_size 400 is larger"),
    ],
)
def test_odd_folders_of_transformers(tmp_path, refused, file, changes, words):
    folder = tmp_path / "hf"
    model_folder.write_model(tmp_path / "sound", *random_variables("deit_testing"))
    to_torch.write(tmp_path / "sound", folder, "hf")
    content = json.loads((folder / file).read_text())
    content.pop("deit_jax", None)
    if file == "preprocessor_config.json":
        content |= {"do_center_crop": True}
    (folder / file).write_text(json.dumps(content | changes))
    assert words in refused(folder)
