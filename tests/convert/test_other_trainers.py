"""Checkpoints as other training programs write them: the weights come out bit for bit."""

import argparse
import collections
import datetime
import decimal
import enum
import functools
import json
import pathlib
import random
import types
import zipfile

import numpy as np
import pytest
import safetensors.numpy
import torch

from deit_jax.convert import from_torch, pickles, to_torch, torch_files
from tests.convert.conftest import command, numpy_state, timm_twin
from tests.convert.test_round_trips import assert_same_bits
from tests.refusal import refusal


class Mode(enum.Enum):
    FAST = 1


class Flags(enum.Flag):
    A, B = 1, 2


class Slots:
    __slots__ = ("a",)


class OwnDict(dict):
    """As Lightning's AttributeDict and OpenMMLab's ConfigDict."""


class OwnList(list):
    pass


class OwnSet(set):
    pass


def beside_the_weights():
    """What people keep: options, dates, numbers, random states, optimisers, whole objects."""
    slots, linear = Slots(), torch.nn.Linear(2, 2)
    slots.a = 5
    optimizer = torch.optim.AdamW(linear.parameters())
    linear(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {
        "args": argparse.Namespace(lr=1e-3, output_dir=pathlib.PurePosixPath("runs/a")),
        "path": pathlib.Path("a"), "windows": pathlib.PureWindowsPath("a"),
        "time": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC), "for": datetime.timedelta(3),
        "mode": Mode.FAST, "flags": Flags.A | Flags.B, "by mode": {Mode.FAST: 1, ("a", 1): 2},
        "nested": collections.defaultdict(list, {1: [2]}), "last": collections.deque([1, 2], 3),
        "count": collections.Counter("aab"), "space": types.SimpleNamespace(a=1), "slots": slots,
        "own": [OwnDict(a=1), OwnList([1]), OwnSet([1])], "set": [{1, 2}, frozenset([1])],
        "decimal": decimal.Decimal("1.5"), "big": 10**400, "range": [range(3), slice(1)],
        "bytes": [b"\xff", bytearray(b"a")], "complex": 1j, "error": ValueError("x"),
        "partial": functools.partial(torch.optim.AdamW, lr=1),
        "rng": [torch.get_rng_state(), random.getstate(), np.random.get_state()],  # noqa: NPY002,
        "generator": np.random.default_rng(0),
        "scalars": [np.dtype(code).type(1) for code in "?bBhHiIlLqQefdgFDG"],
        "dates": [np.datetime64("2026-01-01"), np.timedelta64(3, "D")],
        "strings": [np.str_("a"), np.bytes_(b"a")],
        "arrays": [np.arange(5.0), np.array([{}], object), np.zeros(2, "f4,i4"), np.dtype("f2")],
        "optimizer": optimizer.state_dict(), "whole": linear, "class": torch.nn.Linear,
        "torch": [torch.Size([1]), torch.device("cpu"), torch.float16],
        "parameter": torch.nn.Parameter(torch.ones(1)),
        "odd": [torch.eye(2).to_sparse(), torch.ones(1, dtype=torch.int8), torch.tensor(1j)],
    }  # fmt: skip


@pytest.fixture(scope="module")
def twins():
    """The weights of a model and others of the same names: its EMA, say."""
    return timm_twin("deit_testing"), timm_twin("deit_testing", seed=1)


def _renamed(state, prefix):
    return collections.OrderedDict((prefix + key, value) for key, value in state.items())


def _numbers(state, count):
    return {"n_averaged": torch.tensor(count)} | dict(_renamed(state, "module."))


def trainers(a, b):
    """Content by program, with where the raw weights and their EMA are: a, b, or None."""
    lightning = _renamed(a, "model.") | {
        "criterion.weight": torch.ones(3),
        "top1.n": torch.tensor(3),
    }
    return {
        "reference": {"model": a, "model_ema": b, "epoch": 3, "scaler": {}},
        "timm": {"state_dict": a, "state_dict_ema": b, "arch": "deit", "version": 2, "metric": 1.0},
        "torchvision": {"model": a, "model_ema": _numbers(b, 9), "lr_scheduler": {}},
        "torchvision, DDP": {"model": a, "model_ema": _numbers(_renamed(b, "module."), 9)},
        "lightning": {"state_dict": lightning, "callbacks": {"x": {}}, "hyper_parameters": {}},
        "lightning, EMA": {
            "state_dict": lightning | _numbers({}, 5) | _renamed(b, "ema_model.module."),
            "pytorch-lightning_version": "2.5",
        },
        "lightning, averaging": {
            "state_dict": _renamed(b, "net."), "current_model_state": _renamed(a, "net."),
            "averaging_state": {"n_averaged": torch.tensor(3)},
        },
        "distillation": {"state_dict": _renamed(a, "student.") | _renamed(b, "teacher.backbone.")},
        "accelerate": {"module": a, "ema": {"module": b, "decay": 0.9}},
        "by epochs": {"model_state_dict": a, "ema_state_dict": b, "loss": 1.0},
    }  # fmt: skip


WITHOUT_EMA = ("lightning", "distillation")


@pytest.mark.parametrize("program", trainers({}, {}))
@pytest.mark.parametrize("old", [False, True])
def test_the_weights_of_other_programs(tmp_path, twins, program, old):
    path, states = tmp_path / "checkpoint.pth", [twin.state_dict() for twin in twins]
    content = trainers(*states)[program] | beside_the_weights()
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    for weights, twin in zip(("raw", "ema"), twins, strict=True):
        if weights == "ema" and program in WITHOUT_EMA:
            assert "no EMA in it" in refusal(lambda: from_torch.read(path, weights="ema"))
            continue
        read = from_torch.read(path, weights=weights)
        assert_same_bits(to_torch.tensors(read.variables, read.info, "timm"), numpy_state(twin))
        assert read.info.weights == weights
        said = any("--weights=" in note for note in read.notes)
        assert said == (program not in WITHOUT_EMA)
        left = any("are left out: criterion.weight" in note for note in read.notes)
        assert left == (program in ("lightning", "lightning, EMA"))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("numpy", ["numpy._core", "numpy.core"])
def test_what_stands_beside_the_weights(tmp_path, twins, protocol, numpy):
    """Also as NumPy 1 named its functions; nothing of it is imported or called."""
    path = tmp_path / "a.pth"
    torch.save(
        {"model": twins[0].state_dict()} | beside_the_weights(), path, pickle_protocol=protocol
    )
    if protocol == 2 and numpy == "numpy.core":  # of the others, names carry their lengths
        parts = {}
        with zipfile.ZipFile(path) as archive:
            parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in parts.items():
                archive.writestr(name, data.replace(b"cnumpy._core.", b"cnumpy.core."))
    read = from_torch.read(path)
    assert_same_bits(to_torch.tensors(read.variables, read.info, "timm"), numpy_state(twins[0]))
    content = pickles.torch_load(path, torch)
    assert {type(value).__mro__[1] for value in content["scalars"]} <= {pickles.Inert, object}
    assert isinstance(content["args"], pickles.Inert)
    assert not content["args"].__dict__


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "net.", "backbone.", "module._orig_mod.model.net.backbone.",
     "net.module.", "backbone.model._orig_mod.", "anything.of.theirs.", "model.vit."],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_wrappers_in_any_nesting(tmp_path, prefix, suffix):
    for name in ("deit_testing_distilled", "regnety_testing"):
        twin, path = timm_twin(name), tmp_path / f"a{suffix}"
        if suffix == ".pth":
            torch.save(_renamed(twin.state_dict(), prefix), path)
        else:
            safetensors.numpy.save_file(dict(_renamed(numpy_state(twin), prefix)), path)
        read = from_torch.read(path)
        assert (read.info.name, read.notes[1:]) == (name, ())
        assert_same_bits(to_torch.tensors(read.variables, read.info, "timm"), numpy_state(twin))


def test_a_head_beside_the_backbone(tmp_path, twins):
    state = {
        f"model.{key}" if key.startswith("head.") else f"model.backbone.{key}": value
        for key, value in twins[0].state_dict().items()
    }
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    read = from_torch.read(tmp_path / "a.ckpt")
    assert_same_bits(to_torch.tensors(read.variables, read.info, "timm"), numpy_state(twins[0]))


def test_what_no_rule_decides_is_asked(tmp_path, twins):
    state = twins[0].state_dict()
    for content, words in [
        (_renamed(state, "first.") | _renamed(state, "second."), "begin with first., second."),
        (_renamed(state, "ema."), "holds an EMA alone"),
        ({"model": twins[0]}, "is an object (VisionTransformer)"),
        (twins[0], "holds a pickled VisionTransformer, not a state dict"),
        ({"model": {}}, "or empty"),
    ]:
        torch.save(content, tmp_path / "a.pth")
        assert words in refusal(from_torch.read, tmp_path / "a.pth")


def _shards(folder, state, form):
    """Two files and their index, as transformers and timm write them."""
    names, suffix = sorted(state), {"model": "safetensors", "pytorch_model": "bin"}[form]
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = folder / f"{form}-{number:05}-of-00002.{suffix}"
        if suffix == "bin":
            torch.save({name: torch.from_numpy(state[name]) for name in part}, file)
        else:
            safetensors.numpy.save_file({name: state[name] for name in part}, file)
        index |= dict.fromkeys(part, file.name)
    path = folder / f"{form}.{suffix}.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 9}, "weight_map": index}))
    return path


@pytest.mark.parametrize("form", ["model", "pytorch_model"])
def test_weights_in_several_files(tmp_path, twins, form):
    state = numpy_state(twins[0])
    index = _shards(tmp_path, state, form)
    shards = sorted(set(tmp_path.iterdir()) - {index})
    for source in (tmp_path, index, *shards):
        read = from_torch.read(source)
        assert_same_bits(to_torch.tensors(read.variables, read.info, "timm"), state)
        assert f"2 files are read together, as {index.name} says" in read.notes

    content = json.loads(index.read_text())
    for change, words in [
        ({"more": shards[0].name}, "more is not in it, although the index says so"),
        ({"more": "other.bin"}, "1 of the 3 files that it names are missing: other.bin"),
        *(
            ({"more": bad}, "not the name of a file beside it")
            for bad in ("../a", "/etc/passwd", "", "..")
        ),
        ({"more": 5}, "not a readable index"),
    ]:
        index.write_text(json.dumps({"weight_map": content["weight_map"] | change}))
        assert words in refusal(from_torch.read, tmp_path)
    for text in ("[]", "{", "{}", '{"weight_map": {}}', "[" * 100_000):
        index.write_text(text)
        assert "not a readable index" in refusal(from_torch.read, tmp_path)
    index.unlink()
    assert f"their index {index.name} is missing" in refusal(from_torch.read, shards[0])


def test_a_command_says_which_weights_it_took(tmp_path, twins, capsys):
    states = [twin.state_dict() for twin in twins]
    torch.save({"model": states[0], "model_ema": states[1]}, tmp_path / "a.pth")
    assert command("convert", tmp_path / "a.pth", tmp_path / "model") == 0
    line = "note: the file holds 'model' and 'model_ema': 'model' is taken; --weights=ema takes"
    assert line in capsys.readouterr().out


def test_names_are_read_without_torch_where_they_can_be(tmp_path, twins):
    """And a .safetensors file with an EMA by its names has both."""
    states = [numpy_state(twin) for twin in twins]
    both = dict(_renamed(states[0], "model.") | _renamed(states[1], "model_ema.module."))
    safetensors.numpy.save_file(both, tmp_path / "a.safetensors")
    for weights, state in zip(("raw", "ema"), states, strict=True):
        tensors, _ = torch_files.read(tmp_path / "a.safetensors", weights=weights)
        assert_same_bits(tensors, state)
