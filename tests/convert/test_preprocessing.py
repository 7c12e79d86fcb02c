"""How images are prepared for converted weights: as timm does, as the file says, as asked."""

import json
import re

import numpy as np
import pytest
import timm
import torch

from deit_jax.checkpoints import model_folder
from deit_jax.convert import detect, mapping, preprocessing
from deit_jax.errors import InputError
from deit_jax.models import registry
from deit_jax.models.network import split_model
from tests.convert.conftest import command, numpy_state, save, timm_twin

# Of all 229 names of timm's three families, none of another form is read (timm 1.0.31).
READ = re.compile(r"vit_(tiny|small|base)_patch\d+_\d+|deit.*|regnety_\d+")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def identified(name):
    """The registered model that timm's is read as, or None."""
    with torch.device("meta"):
        shapes = timm.create_model(name).state_dict()
    tensors = {
        key: np.broadcast_to(np.float32(0) if x.is_floating_point() else np.int64(0), x.shape)
        for key, x in shapes.items()
    }
    try:
        layout = detect.layout_of(tensors, name)
        info = detect.identify(tensors, layout, what=name)
        _, like = split_model(model_folder.build(info, registry.abstract_model))
        mapping.to_variables(tensors, like, layout, what=name)
    except InputError:
        return None
    return info


@pytest.mark.slow
def test_every_model_of_timm_that_is_read_has_timms_mean_and_std():
    """Of its transformers also timm's crop; that of its DeiT is not the reference's."""
    tags = {}
    for tagged in timm.list_pretrained():
        tags.setdefault(tagged.partition(".")[0], []).append(tagged)
    checked = {"vit": 0, "deit": 0, "deit3": 0, "regnety": 0}
    for name in filter(READ.fullmatch, timm.list_models()):
        info = identified(name)
        for tagged in [name, *tags.get(name, [])] if info else ():
            theirs, family = timm.get_pretrained_cfg(tagged), name.partition("_")[0]
            checked[family] += 1
            ours = {field: getattr(info, field) for field in preprocessing.FIELDS}
            if family == "vit":
                model, ours = preprocessing.of_timm(f"{tagged}.safetensors")
                assert model == name
                assert ours["crop_ratio"] == theirs.crop_pct, tagged
            assert (ours["mean"], ours["std"]) == (theirs.mean, theirs.std), tagged
            assert ours["interpolation"] == theirs.interpolation
            assert theirs.crop_mode == "center"
    assert min(checked.values()) >= 8, checked


def converted(tmp_path, capsys, name, *flags):
    """The notes of a conversion, and what the model folder says."""
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    save(file, numpy_state(timm_twin("deit_testing")))
    assert command("convert", file, tmp_path / "model", *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    notes = [line.removeprefix("note: ") for line in lines if "note: " in line]
    return notes, model_folder.read_info(tmp_path / "model")


ASSUMED = "the file does not say how its images were prepared; assumed "
FLAGS = "deit-jax convert takes --mean, --std, --crop_ratio, --interpolation for others"


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        (
            "best.safetensors",
            IMAGENET | {"crop_ratio": None},
            "mean 0.485 0.456 0.406, std 0.229 0.224 0.225, crop_ratio none (the whole image), "
            f"interpolation bicubic, as for deit_testing; {FLAGS}",
        ),
        (
            "vit_small_patch16_224.augreg_in1k.safetensors",
            {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_ratio": 0.9},
            "mean 0.5 0.5 0.5, std 0.5 0.5 0.5, crop_ratio 0.9, interpolation bicubic, "
            f"as for timm's vit_small_patch16_224; {FLAGS}",
        ),
        (
            "vit_base_patch16_384/model.safetensors",
            {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_ratio": 1.0},
            f"interpolation bicubic, as for timm's vit_base_patch16_384; {FLAGS}",
        ),
    ],
)
def test_what_is_assumed_is_said(tmp_path, capsys, name, fields, words):
    (note, *_), info = converted(tmp_path, capsys, name)
    assert note.startswith(ASSUMED)
    assert note.endswith(words)
    assert {key: getattr(info, key) for key in fields} == fields


def test_what_is_asked_for_counts(tmp_path, capsys):
    """More than the name of the file; and nothing is assumed any more."""
    flags = ["--mean", "0.1", "0.2", "0.3", "--std", "0.4", "0.5", "0.6", "--crop_ratio", "0.8"]
    notes, info = converted(
        tmp_path, capsys, "vit_base_patch16_224.pth", *flags, "--interpolation", "bilinear"
    )
    assert (info.mean, info.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (info.crop_ratio, info.interpolation) == (0.8, "bilinear")
    assert not any("images were prepared" in note for note in notes)
    again = ["--overwrite", "--crop_ratio", "0"]
    (note, *_), info = converted(tmp_path, capsys, "x.pth", *again)
    assert info.crop_ratio is None
    assert "crop_ratio" not in note


def test_a_description_counts_more_than_a_name_and_less_than_a_flag(tmp_path, capsys):
    """Of a folder of timm's hub, and of a file of ours."""
    folder = tmp_path / "vit_base_patch16_224"
    folder.mkdir()
    said = {"mean": [0.3, 0.3, 0.3], "std": [0.2, 0.2, 0.2], "crop_pct": 0.95}
    config = {"architecture": "x", "pretrained_cfg": said | {"interpolation": "bilinear"}}
    (folder / "config.json").write_text(json.dumps(config))
    save(folder / "model.safetensors", numpy_state(timm_twin("deit_testing")))
    assert command("convert", folder, tmp_path / "a") == 0
    assert "prepared" not in capsys.readouterr().out
    info = model_folder.read_info(tmp_path / "a")
    assert (info.mean, info.std, info.crop_ratio) == ((0.3,) * 3, (0.2,) * 3, 0.95)
    assert command("convert", folder, tmp_path / "b", "--std", "0.5", "0.5", "0.5") == 0
    words = "note: std (0.5, 0.5, 0.5), as asked; the file says (0.2, 0.2, 0.2)"
    assert words in capsys.readouterr().out
    assert model_folder.read_info(tmp_path / "b").std == (0.5,) * 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--mean", "123", "116", "103"], "123 is not a number from 0 to 1"),
        (["--std", "0.5", "0", "0.5"], "--std has a 0"),
        (["--crop_ratio", "nan"], "nan is not a number from 0 to 1"),
    ],
)
def test_other_numbers_are_refused(tmp_path, capsys, flags, words):
    file = save(tmp_path / "a.safetensors", numpy_state(timm_twin("deit_testing")))
    assert command("convert", file, tmp_path / "model", *flags) == 2
    assert words in capsys.readouterr().err


def test_class_names_in_another_order_are_refused(tmp_path, capsys):
    file = save(tmp_path / "a.safetensors", numpy_state(timm_twin("deit_testing", num_classes=3)))
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\nowl\n")
    assert command("convert", file, tmp_path / "model", "--class_names", names) == 0
    file = tmp_path / "b.safetensors"  # says what its classes are
    assert command("export-torch", tmp_path / "model", file, "--format", "timm") == 0
    capsys.readouterr()
    names.write_text("cat\nowl\ndog\n")
    assert command("convert", file, tmp_path / "c", "--class_names", names) == 2
    assert "another order: its class 1 is 'dog', not 'owl'" in capsys.readouterr().err
