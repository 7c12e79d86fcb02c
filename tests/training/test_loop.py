"""Whole runs in one process: folders of images, stopping, faults and what a run leaves behind."""

import json
import shutil
import signal

import numpy as np
import pytest

import deit_jax
from configs import digits, folder
from deit_jax.config.files import load_config
from deit_jax.errors import InputError, NonFiniteLoss
from deit_jax.parallel import lease
from deit_jax.training import loop
from tests import kill_and_resume, several, small_main

pytestmark = pytest.mark.usefixtures("small_models")

QUICK_TEACHER = """
from configs import folder_teacher

def get_config():
    config = folder_teacher.get_config()
    config.model.name = "regnety_testing"
    config.schedule.warmup_epochs = 1
    return config
"""


@pytest.fixture
def folder_config(tmp_path, sample_images):
    """configs/folder.py with models small enough for a test."""
    recipe = tmp_path / "recipes" / "quick_teacher.py"
    recipe.parent.mkdir()
    recipe.write_text(QUICK_TEACHER)
    config = folder.get_config()
    config.model.name = "deit_testing_distilled"
    config.dataset.root = str(sample_images)
    config.input.image_size = 32
    config.distill.teacher_config = str(recipe)
    config.distill.teacher_epochs = 2
    config.optimizer.lr = 2e-3
    config.schedule.epochs = 8
    config.schedule.warmup_epochs = 1
    config.train.batch_size = 16
    config.train.dtype = "float32"
    config.train.log_every_steps = 1
    config.train.eval_every_epochs = 4
    config.train.tensorboard = True
    config.checkpoint.every_epochs = 4
    return config


def lines(workdir, split):
    return [line for line in kill_and_resume.metrics(workdir) if line["split"] == split]


@pytest.fixture
def broken_images(tmp_path, sample_images):
    """The sample with an empty file more in either split."""
    images = tmp_path / "images"
    for path in sample_images.glob("*/*/*.JPEG"):
        link = images / path.relative_to(sample_images)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    for split in ("train", "val"):
        next((images / split).iterdir()).joinpath("empty.JPEG").touch()
    return images


@pytest.mark.slow
def test_a_folder_of_images_trains_teacher_and_student(
    tmp_path, folder_config, broken_images, capsys
):
    """Loss falls, every eval image counts once, and the workdir holds what DESIGN promises.

    Images that cannot be read are left out and counted, also for the teacher.
    """
    workdir, images = tmp_path / "run", broken_images
    folder_config.dataset.root = str(images)
    folder_config.input.on_bad_image = "skip"
    report = loop.train(folder_config, str(workdir))
    assert report["num_examples"] == sum(1 for _ in (images / "val").rglob("*.JPEG")) - 1
    for run in (workdir, workdir / "teacher"):
        assert lines(run, "final")[-1]["skipped_images"] == 1
    assert lines(workdir, "train")[-1]["skipped_images"] == 1
    losses = [line["loss"] for line in lines(workdir, "train")]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert lines(workdir, "final")[-1] == report | {
        "split": "final", "step": len(losses), "epoch": 8.0,
    }  # fmt: skip
    assert set(report) == {
        "top1", "top5", "top1_cls", "top1_dist", "loss", "num_examples", "teacher_top1",
        "skipped_images",
    }  # fmt: skip
    model = deit_jax.load_model(workdir / "model")
    assert model.info.class_names == tuple(sorted(p.name for p in (images / "train").iterdir()))
    assert (workdir / "best" / "model.json").is_file()
    assert json.loads((workdir / "config.json").read_text())["train"]["batch_size"] == 16
    assert list(workdir.glob("events.out.tfevents.*"))
    _evaluates_by_its_split_alone(folder_config, workdir, images, report)
    printed = capsys.readouterr().out
    for word in (
        "parameters", "steps", "peak rate", "distinct", "images/s", "ETA", "input wait",
        "1 unreadable images skipped", "1 unreadable ones left out",
    ):  # fmt: skip
        assert word in printed, word


def _evaluates_by_its_split_alone(config, workdir, images, trained):
    """Without a train split, and with fields that no training on it could have.

    Beside a run that trains there it leaves that one's file alone.
    """
    shutil.rmtree(images / "train")
    config.train.accumulate_steps, config.mixing.group_size = 7, 5
    before = (workdir / "metrics.jsonl").read_bytes()
    with lease.held(str(workdir)):
        assert loop.evaluate(config, str(workdir)) == trained
    assert (workdir / "metrics.jsonl").read_bytes() == before
    (own,) = workdir.glob("metrics.*.jsonl")
    assert trained.items() <= json.loads(own.read_text()).items()
    first = min((images / "val").iterdir())
    first.rename(first.with_name("another"))
    with pytest.raises(InputError, match=r"class 0 .*'another'"):
        loop.evaluate(config, str(workdir))


QUICK = {
    "schedule.epochs": 3,
    "schedule.warmup_epochs": 1,
    "train.log_every_steps": 1,
    "train.eval_every_epochs": 0,
    "checkpoint.every_epochs": 0,
}


@pytest.mark.slow
def test_a_run_that_diverges_stops_with_a_report(tmp_path):
    """An absurd rate: the run names step, seed and examples, and keeps a state that can be read."""
    config = digits.get_config()
    config.update_from_flattened_dict(QUICK)
    config.optimizer.lr = 1e30
    config.train.max_nonfinite_steps = 3
    with pytest.raises(NonFiniteLoss, match=r"steps \d+ to \d+ \(seed 0\).*digits:\d+, digits"):
        loop.train(config, str(tmp_path))
    for name, array in kill_and_resume.final_arrays(tmp_path).items():
        assert np.isfinite(array).all(), name
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(tmp_path, capsys):
    """Status 75 with a message; the next start resumes at that very step."""
    flags = ["--config=configs/digits.py", f"--workdir={tmp_path}"]
    flags += [f"--config.{name}={value}" for name, value in QUICK.items()]
    with several.started(flags, processes=1, script=small_main.SCRIPT) as (process,):
        process.wait_for("\nstep 3/")
        process.send(signal.SIGTERM)
        assert process.wait(120) == 75
    stopped = int(process.stdout.split("saved at step ")[1].split(";")[0])
    loop.train(load_config(tmp_path), str(tmp_path))
    assert f"resumed at step {stopped}" in capsys.readouterr().out
    assert [line["step"] for line in lines(tmp_path, "train")] == list(range(1, 3 * 22 + 1))
    assert 3 <= stopped < 3 * 22
