"""Mistakes of the user: one line that names the field or file, before anything is compiled."""

import contextlib
import dataclasses
import sys

import jax
import numpy as np
import optax
import pytest
from PIL import Image

from deit_jax.checkpoints import model_folder
from deit_jax.checkpoints.training import TrainCheckpoints
from deit_jax.models import registry
from deit_jax.models.network import split_model
from deit_jax.training.state import new_state

_COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def _no_compilation():
    """Makes every compilation fail, also of programs that the cache on disk has ready."""

    def listen(event, duration, **_):
        assert event != _COMPILED, "something was compiled"

    jax.clear_caches()  # what an earlier test compiled would not be compiled again
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_the_guard_sees_compilations():
    with _no_compilation(), pytest.raises(AssertionError, match="was compiled"):
        jax.jit(lambda x: x * 2 + 1)(3.0)


@pytest.fixture
def refused(deit_jax_command, tmp_path):
    """Runs a command on tmp_path/"run", which has to refuse; returns its line."""

    def run(*flags, command="train", recipe="digits", workdir=tmp_path / "run"):
        with _no_compilation():
            ended = deit_jax_command(command, f"--config={recipe}", f"--workdir={workdir}", *flags)
        assert (ended.status, ended.out) == (2, "")
        (line,) = ended.err.splitlines()
        assert line.startswith("error: ")
        assert len(line) < 600
        return line

    return run


REGNET = "model.name=regnety_testing model.patch_size=0"
PHOTOS = "dataset.source=folder dataset.root={images}"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ("optimizer.learning_rate=1", ["config.optimizer.lr?"]),
        ("model.name=deit_smal_patch16_224", ["deit_small_patch16_224"]),
        ("model.patch_size=64", ["patch of 64 pixels"]),
        (REGNET, ["drop_path"]),
        (f"{REGNET} model.drop_path_rate=0 model.remat=True", ["remat"]),
        (f"{REGNET} model.drop_path_rate=0 train.log_attention=True", ["log_attention"]),
        ("optimizer.trainable=ls1/.*", ["config.optimizer.trainable", "'ls1/"]),
        ("dataset.num_classes=12", ["config.dataset.num_classes is 12"]),
        ("train.batch_size=60", ["config.train.batch_size is 60", "try 56 or 64"]),
        ("dataset.source=folder dataset.root=nowhere", ["config.dataset.root is 'nowhere'"]),
        (f"{PHOTOS} dataset.train_split=nowhere", ["train_split is 'nowhere'", "val"]),
        (
            "dataset.source=tfds dataset.name=mnist dataset.root=nowhere",
            ["config.dataset.", "nowhere"],
        ),
    ],
)
def test_fields(refused, tmp_path, monkeypatch, sample_images, fields, words):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    line = refused(*(f"--config.{f}" for f in fields.format(images=sample_images).split()))
    for word in words:
        assert word in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("label", ["3", "-1"])
def test_label_outside_the_class_range(refused, tmp_path, label):
    data = tmp_path / "data"
    rows = [("train", "a", "0"), ("train", "b", "2"), ("test", "c", "1"), ("test", "d", label)]
    for split, name, _ in rows:
        (data / split).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(data / split / f"{name}.png")
    lines = [f"{name}.png,{number}\n" for _, name, number in rows]
    (data / "labels.csv").write_text("".join(lines))
    flags = ("source=folder", f"root={data}", "label_file=labels.csv", "num_classes=3")
    line = refused(*(f"--config.dataset.{flag}" for flag in flags))
    assert f"{data / 'labels.csv'}, line 4" in line
    assert label in line


def _untrained(name, **options):
    """A model of zeros, and its description as training on the digits would write it."""
    network, like = split_model(registry.abstract_model(name, **options))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    names = tuple("0123456789")[: network.info.num_classes]
    return zeros, dataclasses.replace(network.info, class_names=names)


@pytest.mark.parametrize(
    ("teacher", "flags", "words"),
    [
        ({"num_classes": 7}, [], ["{folder} has 7 classes", "10"]),
        ({"class_names": tuple("0123456798")}, [], ["{folder} calls class 8 '9'", "'8'"]),
        (None, [], ["no model folder at {folder}", "teacher_config"]),
        # It may be misspelt, or hold something else: none is trained into a folder that was named.
        (
            None,
            ["--config.distill.teacher_config=digits_teacher"],
            ["{folder}", "--config.distill.teacher= "],
        ),
        ({}, ["--config.model.name=deit_testing"], ["config.distill.kind is 'hard'"]),
        ({}, ["--config.distill.class_head=True"], ["class_head is True", "a model without token"]),
    ],
)
def test_teachers(refused, tmp_path, teacher, flags, words):
    folder = tmp_path / "teacher"
    if teacher is not None:
        classes = teacher.pop("num_classes", 10)
        weights, info = _untrained("regnety_testing", num_classes=classes)
        model_folder.write_model(folder, weights, dataclasses.replace(info, **teacher))
    ours = [f"--config.distill.teacher={folder}", "--config.distill.teacher_config="]
    line = refused(*ours, *flags, recipe="digits_distill")
    for word in words:
        assert word.format(folder=folder) in line
    assert folder.exists() == (teacher is not None)


def _save_checkpoint(workdir, name, **options):
    weights, info = _untrained(name, **{"num_classes": 10} | options)
    state = new_state(weights, optax.identity(), ema=True)
    with contextlib.closing(TrainCheckpoints(workdir, keep=1)) as checkpoints:
        checkpoints.save(state, info, step=3, best={"top1": 1.0, "step": 3})


def test_checkpoint_of_another_model_in_the_workdir(refused, tmp_path):
    _save_checkpoint(tmp_path / "run", "deit3_testing")
    for command in ("train", "eval", "plan"):
        line = refused(command=command)
        assert str(tmp_path / "run" / "checkpoints" / "3") in line
        assert "'deit3_testing'" in line
        assert "'deit_testing'" in line
    assert not (tmp_path / "run" / "config.json").exists()


def test_checkpoint_of_another_model_is_found_before_a_teacher_is_trained(refused, tmp_path):
    _save_checkpoint(tmp_path / "run", "deit_testing_distilled", num_classes=4)
    assert "num_classes 4, but the config asks for 10" in refused(recipe="digits_distill")
    assert not (tmp_path / "run" / "teacher").exists()


@pytest.mark.parametrize(
    ("name", "command", "words"),
    [
        ("", "train", "not a model folder"),
        ("deit3_testing", "train", ": these are weights of deit3_testing, but the model asked"),
        ("deit_testing", "eval", "10 classes, where deit_testing has 4"),
    ],
)
def test_weights_to_start_from_that_do_not_fit(refused, tmp_path, name, command, words):
    folder = tmp_path / "start"
    if name:
        model_folder.write_model(folder, *_untrained(name, num_classes=4, patch_size=8))
    line = refused(f"--config.init_from={folder}", command=command)
    assert f"--config.init_from={folder}: " in line
    assert words in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", ["folder:finetune", "finetune_deit3:b_384"])
def test_a_recipe_that_fine_tunes_needs_weights(refused, recipe):
    for command in ("train", "plan"):
        line = refused(command=command, recipe=recipe)
        assert line.endswith("needs --config.init_from=FOLDER, a converted model or a run")


@pytest.mark.parametrize("leftover", [False, True])
def test_evaluation_of_a_workdir_without_a_checkpoint(refused, tmp_path, leftover):
    if leftover:  # a run that was killed in its first save
        (tmp_path / "run" / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    assert f"--workdir={tmp_path / 'run'} holds no checkpoint" in refused(command="eval")
    assert (tmp_path / "run").exists() == leftover


def test_workdir_that_cannot_be_made(refused, tmp_path):
    (tmp_path / "file").write_text("in the way")
    workdir = tmp_path / "file" / "run"
    assert f"--workdir={workdir} cannot be written" in refused(workdir=workdir)


@pytest.mark.parametrize("command", ["train", "eval", "plan"])
def test_workdir_that_is_a_link_to_itself(refused, tmp_path, command):
    (tmp_path / "run").symlink_to("run")
    workdir = tmp_path / "run"
    line = refused(command=command)
    assert f"--workdir={workdir} cannot be written ({workdir} is not a folder)" in line


def test_checkpoints_that_are_a_link_to_themselves(refused, tmp_path):
    link = tmp_path / "run" / "checkpoints"
    link.parent.mkdir()
    link.symlink_to("checkpoints")
    assert f"{link} cannot be read now (Too many levels of symbolic links)" in refused()


@pytest.mark.parametrize("field", ["dataset.source=folder dataset.root", "init_from"])
def test_links_to_themselves_in_place_of_folders(refused, tmp_path, field):
    (tmp_path / "loop").symlink_to("loop")
    line = refused(*(f"--config.{f}" for f in f"{field}={tmp_path / 'loop'}".split()))
    assert str(tmp_path / "loop") in line
    assert not (tmp_path / "run").exists()


def test_tensorboard_that_is_not_installed(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer", None)
    assert "config.train.tensorboard" in refused("--config.train.tensorboard=True")


def test_wandb_that_is_not_installed(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install 'deit-jax[wandb]'" in refused("--config.train.wandb=mine")
