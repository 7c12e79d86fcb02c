"""A run goes on as what it was: changes of what a step means are refused, or accepted by name."""

import json
import shutil

import pytest

from configs import digits
from deit_jax.config.validate import CHANGEABLE
from deit_jax.errors import InputError
from deit_jax.training import continuation, loop


def config_of(**changes):
    config = digits.get_config()
    config.dataset.train_fraction = 0.125
    config.model.drop_path_rate = 0.0
    config.schedule.update({"epochs": 1, "warmup_epochs": 0})
    config.train.update({"batch_size": 16, "ema_decay": 0.0})
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    loop.train(config_of(), str(workdir))
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train.batch_size": 32}, "train.batch_size steps_per_epoch"),
        ({"train.seed": 1}, "train.seed"),
        ({"input.repeats": 2}, "input.repeats"),
        ({"mixing.group_size": 4}, "mixing.group_size"),
        ({"dataset.train_fraction": 0.127}, "data"),
        ({"dataset.train_fraction": 0.5}, "steps_per_epoch data"),
    ],
)
def test_what_a_step_means_may_not_change(finished, changes, named):
    before = sorted(path.name for path in finished.rglob("*"))
    with pytest.raises(InputError, match=f"step 11 .*accept_changes='{named}'$") as caught:
        loop.train(config_of(**changes), str(finished))
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in finished.rglob("*")) == before


@pytest.mark.slow
def test_more_epochs_and_accepted_changes_go_on(finished, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    longer = {"schedule.epochs": 2, "train.seed": 1, "checkpoint.accept_changes": "train.seed"}
    loop.train(config_of(**longer), str(workdir))
    printed = capsys.readouterr().out
    assert "note: schedule.epochs was 1 and is 2: from here the rate follows" in printed
    assert "note: train.seed was 0 and is 1, as accepted" in printed
    assert "resumed at step 11" in printed
    meta = json.loads((workdir / "checkpoints" / "22" / "meta" / "metadata").read_text())
    assert meta["run"]["train.seed"] == 1
    with pytest.raises(InputError, match=r"schedule.epochs was 2 and is 1"):
        loop.train(config_of(**{"train.seed": 1}), str(workdir))


def test_every_consequence_can_be_accepted():
    assert set(continuation._CONSEQUENCES) == set(CHANGEABLE)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["checkpoint", "init_from"])
def test_a_model_is_evaluated_with_the_images_it_was_trained_on(finished, tmp_path, capsys, source):
    other = {"input.mean": (0.4, 0.5, 0.6), "input.std": (0.2, 0.2, 0.2)}
    other |= {"input.interpolation": "bilinear", "input.train_crop": "random_resized"}
    want = loop.evaluate(config_of(), str(finished))
    workdir = finished
    if source == "init_from":
        workdir, other["init_from"] = tmp_path, str(finished / "model")
    assert loop.evaluate(config_of(**other), str(workdir)) == want
    printed = capsys.readouterr().out
    for name in ("mean", "std", "interpolation", "train_crop"):
        assert f"note: evaluating with input.{name} " in printed
