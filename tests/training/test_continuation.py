"""A run goes on as what it was: changes of what a step means are refused, or accepted by name."""

import contextlib
import dataclasses
import json
import re
import shutil
import unicodedata

import pytest

from configs import digits
from deit_jax import console, data
from deit_jax.config.validate import CHANGEABLE
from deit_jax.errors import InputError
from deit_jax.training import continuation, loop
from deit_jax.training.setup import check, initial_state
from deit_jax.training.summary import describe_run

pytestmark = pytest.mark.usefixtures("small_models")


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
def test_more_epochs_and_accepted_changes_go_on(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "_PATIENCE", 0.0)
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    longer = {"schedule.epochs": 2, "train.seed": 1, "checkpoint.accept_changes": "train.seed"}
    loop.train(config_of(**longer), str(workdir))
    printed = capsys.readouterr().out
    assert "note: schedule.epochs was 1 and is 2: from here the rate follows" in printed
    assert "note: train.seed was 0 and is 1, as accepted" in printed
    assert "resumed at step 11" in printed
    for what in ("opening the data", "restoring the checkpoint", "compiling the training step"):
        assert f"{what} …\n" in printed
    meta = json.loads((workdir / "checkpoints" / "22" / "meta" / "metadata").read_text())
    assert meta["run"]["train.seed"] == 1
    with pytest.raises(InputError, match=r"schedule.epochs was 2 and is 1"):
        loop.train(config_of(**{"train.seed": 1}), str(workdir))


def test_every_consequence_can_be_accepted():
    assert set(continuation._CONSEQUENCES) == set(CHANGEABLE)


@pytest.fixture
def swapped(monkeypatch):
    """Two classes of the data have changed places."""
    opened = data.open_source

    def open_source(*arguments):
        return dataclasses.replace(opened(*arguments), class_names=tuple("0124356789"))

    monkeypatch.setattr(data, "open_source", open_source)


@pytest.mark.slow
@pytest.mark.usefixtures("swapped")
@pytest.mark.parametrize("act", [loop.train, loop.evaluate])
@pytest.mark.parametrize("source", ["checkpoint", "init_from", "teacher"])
def test_class_names_are_compared_where_weights_meet_data(finished, tmp_path, capsys, act, source):
    """The same ten names in another order: every label would mean something else."""
    config, workdir = config_of(), tmp_path / "run"
    if source == "checkpoint":
        workdir = finished
        words = "class 3 is '3', but in the data set it is '4'; its labels would mean something"
    elif source == "teacher":
        config.model.name, config.distill.kind = "deit_testing_distilled", "hard"
        config.distill.teacher = str(finished)
        words = "class 3 '3', but the data set calls it '4'; its labels mean something else"
    else:
        config.init_from = str(finished)
        words = "10 classes as before, but other ones: '3' is now '4'"
    if source == "init_from" and act is loop.train:
        act(config, str(workdir))  # it may learn other classes
        assert f"head newly initialised: {words}" in capsys.readouterr().out
        return
    with pytest.raises(InputError, match=re.escape(words)):
        act(config, str(workdir))


@pytest.mark.slow
def test_class_names_in_another_unicode_form_are_the_same(tmp_path, monkeypatch):
    """As macOS decomposes the names of folders that are copied there."""
    opened, form = data.open_source, "NFC"

    def open_source(*arguments):
        names = tuple(unicodedata.normalize(form, f"mü{number}") for number in range(10))
        return dataclasses.replace(opened(*arguments), class_names=names)

    monkeypatch.setattr(data, "open_source", open_source)
    trained = tmp_path / "trained"
    loop.train(config_of(), str(trained))
    form = "NFD"
    result = loop.evaluate(config_of(), str(trained))
    config = config_of()
    config.init_from = str(trained)
    assert loop.evaluate(config, str(tmp_path / "none")) == result
    config.model.name, config.distill.kind = "deit_testing_distilled", "hard"
    config.init_from, config.distill.teacher = "", str(trained)
    loop.train(config, str(tmp_path / "student"))


@pytest.mark.slow
@pytest.mark.parametrize("source", ["checkpoint", "init_from"])
def test_a_model_is_trained_on_with_its_own_mean_and_std(finished, tmp_path, source):
    """What the weights expect; crop and interpolation are the recipe's choice, and said."""
    fields = {"input.mean": (0.4, 0.5, 0.6), "input.std": (0.2, 0.2, 0.2)}
    fields |= {"input.interpolation": "bilinear", "schedule.epochs": 2}
    workdir = tmp_path / "run"
    if source == "checkpoint":
        shutil.copytree(finished, workdir)
    else:
        fields["init_from"] = str(finished)
    run = check(config_of(**fields), str(workdir))
    with contextlib.closing(loop.open_checkpoints(run, training=True)) as checkpoints:
        _, _, _, origin = initial_state(run, checkpoints)
    summary = describe_run(run, origin)
    for name, theirs in (("mean", (0.4, 0.5, 0.6)), ("std", (0.2, 0.2, 0.2))):
        assert run.config.input[name] == getattr(run.network.info, name) == (0.5, 0.5, 0.5)
        words = (
            f"training with input.{name} (0.5, 0.5, 0.5), as the model was trained, not {theirs}"
        )
        assert f"  note      {words}" in summary.splitlines()
    assert run.network.info.interpolation == "bilinear"
    if source == "init_from":
        assert "its images had interpolation bicubic, this run's have bilinear" in origin


@pytest.mark.slow
@pytest.mark.parametrize("source", ["checkpoint", "init_from"])
def test_a_model_is_evaluated_with_the_images_it_was_trained_on(finished, tmp_path, capsys, source):
    other = {"input.mean": (0.4, 0.5, 0.6), "input.std": (0.2, 0.2, 0.2)}
    other |= {"input.interpolation": "bilinear", "input.train_crop": "random_resized"}
    want = loop.evaluate(config_of(), str(finished))
    workdir = finished
    if source == "init_from":
        workdir, other["init_from"] = tmp_path / "new", str(finished / "model")
        other["train.ema_decay"] = 0.9  # of which a model folder has nothing to report
    assert loop.evaluate(config_of(**other), str(workdir)) == want
    printed = capsys.readouterr().out
    for name in ("mean", "std", "interpolation", "train_crop"):
        assert f"  note      evaluating with input.{name} " in printed


@pytest.mark.slow
def test_a_kernel_that_evaluation_lacks_is_one_line(finished, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(finished / "model", folder)
    described = json.loads((folder / "model.json").read_text()) | {"interpolation": "lanczos"}
    del described["digest"]
    (folder / "model.json").write_text(json.dumps(described))
    words = f"as the model of {folder} was trained, config.input.interpolation is 'lanczos'"
    with pytest.raises(InputError, match=re.escape(words)):
        loop.evaluate(config_of(init_from=str(folder)), str(tmp_path / "new"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model", "best"])
def test_a_place_that_is_taken_shows_before_training(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "notes.txt").touch()
    with pytest.raises(InputError, match=f"{name} exists and is not a model folder; remove it"):
        loop.train(config_of(), str(tmp_path))
    assert not (tmp_path / "checkpoints").exists()
