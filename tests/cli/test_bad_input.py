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
from deit_jax.config.files import load_config
from deit_jax.errors import InputError
from deit_jax.models import registry
from deit_jax.models.network import split_model
from deit_jax.training import loop
from deit_jax.training.state import new_state

_COMPILED = "/jax/core/compile/backend_compile_duration"


class _Compiled(Exception):
    """Something was compiled that should not have been."""


@contextlib.contextmanager
def _no_compilation():
    """Makes every compilation fail, also of programs that the cache on disk has ready."""

    def listen(event, duration, **_):
        if event == _COMPILED:
            raise _Compiled

    jax.clear_caches()  # what an earlier test compiled would not be compiled again
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_the_guard_sees_compilations():
    with _no_compilation(), pytest.raises(_Compiled):
        jax.jit(lambda x: x * 2 + 1)(3.0)
    jax.jit(lambda x: x * 2 + 1)(3.0)  # and is gone afterwards


def _refusal(config, workdir, run=loop.train):
    with _no_compilation(), pytest.raises(InputError) as caught:
        run(config, str(workdir))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.fixture
def digits(repo_root):
    """The recipe of the digits, to be spoilt."""
    return load_config(str(repo_root / "configs" / "digits.py"))


@pytest.fixture
def distilling(repo_root, tmp_path):
    """The distilled recipe with a teacher that fits."""
    config = load_config(str(repo_root / "configs" / "digits_distill.py"))
    config.distill.teacher = str(tmp_path / "teacher")
    config.distill.teacher_config = ""
    return config


def _untrained(name, **options):
    """A model of zeros, and its description as training on the digits would write it."""
    network, like = split_model(registry.abstract_model(name, **options))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    names = tuple("0123456789")[: network.info.num_classes]
    return zeros, dataclasses.replace(network.info, class_names=names)


def _save_teacher(folder, *, num_classes=10, **changes):
    weights, info = _untrained("regnety_testing", num_classes=num_classes)
    model_folder.write_model(folder, weights, dataclasses.replace(info, **changes))


# The list of the project's issue


def test_unknown_field(digits, tmp_path):
    digits.optimizer.learning_rate = 1e-3
    assert "did you mean config.optimizer.lr?" in _refusal(digits, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_wrong_type(digits, tmp_path):
    with digits.ignore_type():
        digits.schedule.epochs = 2.5
    message = _refusal(digits, tmp_path / "run")
    assert "config.schedule.epochs is 2.5, but must be int" in message


@pytest.mark.parametrize("source", ["folder", "tfds"])
def test_missing_data_directory(digits, tmp_path, source):
    digits.dataset.source = source
    digits.dataset.name = "imagenet2012"
    digits.dataset.root = str(tmp_path / "nowhere")
    message = _refusal(digits, tmp_path / "run")
    assert "config.dataset." in message
    assert str(tmp_path / "nowhere") in message
    assert not (tmp_path / "run").exists()


def test_missing_split(digits, tmp_path, sample_images):
    digits.dataset.source = "folder"
    digits.dataset.root = str(sample_images)
    digits.dataset.eval_split = "validation"
    message = _refusal(digits, tmp_path / "run")
    assert "config.dataset.eval_split is 'validation'" in message
    assert "train, val" in message


@pytest.mark.parametrize("label", ["3", "-1"])
def test_label_outside_the_class_range(digits, tmp_path, label):
    data = tmp_path / "data"
    for split in ("train", "test"):
        (data / split).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8)).save(data / split / f"{split}{number}.png")
    rows = [f"{split}{number}.png,{number}" for split in ("train", "test") for number in range(3)]
    rows[4] = f"test1.png,{label}"
    (data / "labels.csv").write_text("\n".join(rows) + "\n")
    digits.dataset.source = "folder"
    digits.dataset.root = str(data)
    digits.dataset.label_file = "labels.csv"
    digits.dataset.num_classes = 3
    message = _refusal(digits, tmp_path / "run")
    assert f"{data / 'labels.csv'}, line 5" in message
    assert label in message


def test_another_number_of_classes_than_the_data(digits, tmp_path):
    digits.dataset.num_classes = 12
    assert "config.dataset.num_classes is 12" in _refusal(digits, tmp_path / "run")


def test_teacher_with_another_class_count(distilling, tmp_path):
    _save_teacher(tmp_path / "teacher", num_classes=7)
    message = _refusal(distilling, tmp_path / "run")
    assert "config.distill.teacher" in message
    assert f"{tmp_path / 'teacher'} has 7 classes" in message
    assert "10" in message


def test_teacher_whose_labels_mean_something_else(distilling, tmp_path):
    names = ("0", "1", "2", "3", "4", "5", "6", "7", "9", "8")
    _save_teacher(tmp_path / "teacher", class_names=names)
    message = _refusal(distilling, tmp_path / "run")
    assert f"{tmp_path / 'teacher'} calls class 8 '9', but the data set calls it '8'" in message


def test_teacher_that_is_not_there(distilling, tmp_path):
    message = _refusal(distilling, tmp_path / "run")
    assert f"config.distill.teacher: no model folder at {tmp_path / 'teacher'}" in message
    assert "teacher_config" in message


def test_a_teacher_is_never_trained_into_a_folder_that_was_named(distilling, tmp_path):
    """It may be misspelt, or hold something else."""
    distilling.distill.teacher_config = "digits_teacher"
    message = _refusal(distilling, tmp_path / "run")
    assert f"config.distill.teacher: no model folder at {tmp_path / 'teacher'}" in message
    assert "--config.distill.teacher= trains one in WORKDIR/teacher" in message
    assert not (tmp_path / "teacher").exists()


def test_distillation_with_a_model_that_has_no_distillation_token(distilling, tmp_path):
    _save_teacher(tmp_path / "teacher")
    distilling.model.name = "deit_testing"
    message = _refusal(distilling, tmp_path / "run")
    assert "config.distill.kind is 'hard'" in message
    assert "'deit_testing' has no distillation token" in message


def test_batch_that_the_mesh_does_not_divide(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    digits.train.batch_size = 60
    message = _refusal(digits, tmp_path / "run")
    assert "config.train.batch_size is 60" in message
    assert "8 devices" in message
    assert "try 56 or 64" in message


def _save_checkpoint(workdir, name, **options):
    weights, info = _untrained(name, **{"num_classes": 10} | options)
    state = new_state(weights, optax.identity(), ema=True)
    with contextlib.closing(TrainCheckpoints(workdir, keep=1)) as checkpoints:
        checkpoints.save(state, info, step=3, best={"top1": 1.0, "step": 3}, top1=1.0)


def test_checkpoint_of_another_model_in_the_workdir(digits, tmp_path):
    _save_checkpoint(tmp_path / "run", "deit3_testing")
    for run in (loop.train, loop.evaluate):
        message = _refusal(digits, tmp_path / "run", run)
        assert str(tmp_path / "run" / "checkpoints" / "3") in message
        assert "name 'deit3_testing', but the config asks for 'deit_testing'" in message
    assert not (tmp_path / "run" / "config.json").exists()


def test_checkpoint_of_another_model_is_found_before_a_teacher_is_trained(repo_root, tmp_path):
    config = load_config(str(repo_root / "configs" / "digits_distill.py"))
    _save_checkpoint(tmp_path / "run", "deit_testing_distilled", num_classes=4)
    message = _refusal(config, tmp_path / "run")
    assert "num_classes 4, but the config asks for 10" in message
    assert not (tmp_path / "run" / "teacher").exists()


def test_checkpoint_with_an_average_where_the_config_has_none(digits, tmp_path):
    _save_checkpoint(tmp_path / "run", "deit_testing", patch_size=digits.model.patch_size)
    digits.train.ema_decay = 0.0
    message = _refusal(digits, tmp_path / "run")
    assert "with an EMA, but config.train.ema_decay" in message


# And what else people get wrong


def test_unknown_model(digits, tmp_path):
    digits.model.name = "deit_smal_patch16_224"
    message = _refusal(digits, tmp_path / "run")
    assert "deit_smal_patch16_224" in message
    assert "deit_small_patch16_224" in message


def test_model_options_that_do_not_fit(digits, tmp_path):
    digits.model.patch_size = 64
    assert "smaller than one patch of 64 pixels" in _refusal(digits, tmp_path / "run")
    digits.model.patch_size = 0
    digits.model.name = "regnety_testing"
    digits.model.drop_path_rate = 0.1
    assert "drop_path_rate" in _refusal(digits, tmp_path / "run")
    digits.model.drop_path_rate = 0.0
    digits.model.remat = True
    assert "remat" in _refusal(digits, tmp_path / "run")


def test_attention_of_a_model_without_any(digits, tmp_path):
    digits.model.name, digits.model.patch_size = "regnety_testing", 0
    digits.model.drop_path_rate, digits.train.log_attention = 0.0, True
    assert "config.train.log_attention is True" in _refusal(digits, tmp_path / "run")


def test_parameters_to_train_that_the_model_does_not_have(digits, tmp_path):
    digits.optimizer.trainable = "head/.* ls1/.*"
    message = _refusal(digits, tmp_path / "run")
    assert "config.optimizer.trainable is 'head/.* ls1/.*', but 'ls1/.*' matches no" in message


@pytest.mark.parametrize(
    ("name", "run", "words"),
    [
        ("", loop.train, "no model folder"),
        ("deit3_testing", loop.train, "unexpected params/blocks/0/ls1/gamma"),
        ("deit_testing", loop.evaluate, "10 classes, where deit_testing has 4"),
    ],
)
def test_weights_to_start_from_that_do_not_fit(digits, tmp_path, name, run, words):
    folder = tmp_path / "start"
    if name:
        options = {"num_classes": 4, "patch_size": digits.model.patch_size}
        weights, info = _untrained(name, **options)
        model_folder.write_model(folder, weights, info)
    digits.init_from = str(folder)
    message = _refusal(digits, tmp_path / "run", run)
    assert f"--config.init_from={folder}: " in message
    assert words in message
    assert not (tmp_path / "run").exists()


def test_batch_larger_than_the_train_split(digits, tmp_path):
    digits.train.batch_size = 2048
    message = _refusal(digits, tmp_path / "run")
    assert "config.train.batch_size is 2048" in message
    assert "1438 images" in message


@pytest.mark.parametrize("leftover", [False, True])
def test_evaluation_of_a_workdir_without_a_checkpoint(digits, tmp_path, leftover):
    if leftover:  # a run that was killed in its first save
        (tmp_path / "run" / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    message = _refusal(digits, tmp_path / "run", loop.evaluate)
    assert f"--workdir={tmp_path / 'run'} holds no checkpoint" in message
    assert (tmp_path / "run").exists() == leftover


def test_workdir_that_cannot_be_made(digits, tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = _refusal(digits, tmp_path / "file" / "run")
    assert f"--workdir={tmp_path / 'file' / 'run'} cannot be written" in message


def test_tensorboard_that_is_not_installed(digits, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer", None)
    digits.train.tensorboard = True
    assert "config.train.tensorboard" in _refusal(digits, tmp_path / "run")


# The same through the command line

_DIGITS = "--config=configs/digits.py"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([_DIGITS, "--config.optimizer.lrr=1"], ["lrr"]),
        ([_DIGITS, "--config.schedule.epochs=2.5"], ["config.schedule.epochs", "2.5"]),
        (
            [_DIGITS, "--config.model={'name': 'deit_testing'}"],
            ["config.model ", "group of fields", "model.patch_size"],
        ),
        (["--config=configs/nowhere.py"], ["configs/nowhere.py", "deit_b_distill"]),
        (["--config=configs/deit3.py:xl"], ["deit3 has no run 'xl', only ti, s, m"]),
        (["--config=configs/digits.py:b"], ["digits:b", "has one run only"]),
        ([_DIGITS, "stray"], ["'stray'", "see --help"]),
        ([_DIGITS, "--config.train.batch_size=60"], ["config.train.batch_size is 60", "8 devices"]),
        (
            [_DIGITS, "--config.dataset.source=folder", "--config.dataset.root=nowhere"],
            ["config.dataset.root is 'nowhere'"],
        ),
    ],
)
def test_the_command_line_ends_in_one_line_and_status_2(run_main, tmp_path, flags, words):
    devices = {"JAX_NUM_CPU_DEVICES": "8"}
    finished = run_main(*flags, f"--workdir={tmp_path / 'run'}", env=devices)
    assert finished.returncode == 2
    assert finished.stdout == ""
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert not (tmp_path / "run").exists()
