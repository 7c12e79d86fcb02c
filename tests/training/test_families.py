"""Runs of the models beside DeiT's: training, a teacher, evaluation, and another resolution."""

import contextlib

import jax
import numpy as np
import pytest

import deit_jax
from configs import digits
from deit_jax.checkpoints import model_folder
from deit_jax.errors import InputError
from deit_jax.models import registry
from deit_jax.models.network import split_model
from deit_jax.training import loop
from deit_jax.training.setup import check, check_model, check_start
from tests import kill_and_resume


def recipe(name):
    config = digits.get_config()
    config.model.name, config.model.remat = name, True
    config.model.patch_size = 0 if name == "hmlp_testing" else 8
    config.schedule.epochs, config.schedule.warmup_epochs = 2, 1
    config.train.dtype = "bfloat16"
    config.train.log_attention = name != "resmlp_testing"
    config.train.log_every_steps = 2
    config.train.eval_every_epochs = config.checkpoint.every_epochs = 0
    return config


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    network, like = split_model(registry.abstract_model("regnety_testing", num_classes=10))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    folder = tmp_path_factory.mktemp("teacher") / "model"
    model_folder.write_model(folder, zeros, network.info)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["cait_testing", "resmlp_testing", "parallel_testing", "hmlp_testing"]
)
def test_a_run(name, teacher, tmp_path):
    config = recipe(name)
    with_teacher = name in ("cait_testing", "resmlp_testing")
    config.distill.kind, config.distill.teacher = "hard", teacher
    if not with_teacher:
        with pytest.raises(InputError, match=f"'{name}' has no distillation token"):
            check(config, str(tmp_path))
        config.distill.kind, config.distill.teacher = "none", ""
    report = loop.train(config, str(tmp_path / "run"))
    metrics = kill_and_resume.metrics(tmp_path / "run")
    steps = [line for line in metrics if line["split"] == "train"]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert all("attention_max" in line for line in steps) == config.train.log_attention
    assert all("teacher_agreement" in line for line in steps) == with_teacher
    again = deit_jax.evaluate(config, str(tmp_path / "run"))
    assert again["ema_top1"] == report["ema_top1"]
    assert np.isfinite(again["loss"])

    other = recipe(name)
    other.init_from, other.input.image_size = str(tmp_path / "run"), 48
    run = check(other, str(tmp_path / "other"))
    if name == "resmlp_testing":
        with pytest.raises(InputError, match=r"of 32×32 pixels, and no others"):
            check_start(run, training=True)
    else:
        check_start(run, training=True)


def test_log_attention_is_refused_where_there_is_none(tmp_path):
    config = recipe("resmlp_testing")
    config.train.log_attention = True
    with pytest.raises(InputError, match="'resmlp_testing' has no attention"):
        check(config, str(tmp_path))


@pytest.mark.parametrize(
    ("name", "distilled", "class_head", "words"),
    [
        ("deit_testing", True, True, "with options distilled=True has a distillation token"),
        ("deit_testing", True, False, None),
        ("deit_testing_distilled", False, False, "distilled=False has no distillation token"),
        ("deit_testing_distilled", False, True, None),
    ],
)
def test_a_token_is_there_as_the_options_say(name, distilled, class_head, words):
    config = recipe(name)
    config.model.options = f"distilled={distilled}"
    config.distill.kind, config.distill.class_head = "hard", class_head
    with pytest.raises(InputError, match=words) if words else contextlib.nullcontext():
        check_model(config, "cpu")
