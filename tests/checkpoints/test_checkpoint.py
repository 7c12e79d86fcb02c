"""Model folders and training checkpoints: exact round trips, crashes, damage, foreign weights."""

import contextlib
import dataclasses
import shutil

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from deit_jax import storage, trees
from deit_jax.checkpoints import model_folder
from deit_jax.checkpoints.model_folder import (
    find_model,
    load_checkpoint,
    load_model,
    read_info,
    save_model,
)
from deit_jax.checkpoints.training import TrainCheckpoints
from deit_jax.models import registry
from deit_jax.models.network import join_model, split_model
from deit_jax.training.state import new_state
from tests.refusal import refusal

TINY = {"num_classes": 3, "embed_dim": 8, "num_heads": 2, "patch_size": 16}


def _model(name="deit_testing", *, seed=0, **options):
    """A model full of random numbers, none of them compiled."""
    network, like = split_model(registry.abstract_model(name, **options))
    rng = np.random.default_rng(seed)
    weights = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), like)
    return join_model(network, weights)


def _tiny(*, seed=0, depth=1, **options):
    return _model(seed=seed, depth=depth, **(TINY | options))


def _arrays(model_or_tree):
    tree = split_model(model_or_tree)[1] if hasattr(model_or_tree, "info") else model_or_tree
    return {name: np.asarray(leaf) for name, leaf in trees.flat(tree).items()}


def _assert_equal(found, expected):
    found, expected = _arrays(found), _arrays(expected)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


# Model folders


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit_testing_distilled", {"num_classes": 7}),
        ("deit3_testing", {"num_classes": 7}),
        ("regnety_testing", {"num_classes": 7}),
        # From 11 blocks on, numbers as names sort differently from numbers: 0, 1, 10, 11, 2, ...
        ("deit_testing", {**TINY, "depth": 12}),
    ],
)
def test_round_trip_is_exact_for_us_and_for_plain_orbax(tmp_path, name, options):
    model = _model(name, **options)
    save_model(tmp_path / "deep" / "model", model)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"]
    loaded = load_model(tmp_path / "deep" / "model")
    _assert_equal(loaded, model)
    assert loaded.info == model.info
    _assert_equal(load_model(tmp_path / "deep"), model)  # a run folder holds its model

    # The lines that the README shows to people without deit_jax.
    tree = ocp.PyTreeCheckpointer().restore(tmp_path / "deep" / "model" / "weights")
    plain = {**trees.flat(tree["params"]), **trees.flat(tree.get("batch_stats") or {})}
    variables = split_model(model)[1]
    expected = {**trees.flat(variables.params), **trees.flat(variables.batch_stats)}
    assert plain.keys() == expected.keys()
    for leaf, array in expected.items():
        np.testing.assert_array_equal(plain[leaf], array, err_msg=leaf)


def test_model_json_says_all_that_prediction_needs(tmp_path):
    model = _tiny()
    model.info = dataclasses.replace(
        model.info, class_names=("Affe", "Bär", "猫"), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6),
        crop_ratio=None, interpolation="bilinear", source="a test", weights="ema",
    )  # fmt: skip
    save_model(tmp_path / "model", model)
    assert "Bär" in (tmp_path / "model" / "model.json").read_text(encoding="utf-8")
    assert read_info(tmp_path / "model") == load_model(tmp_path / "model").info == model.info


class _Crash(BaseException):
    """Stands for a kill: nothing in the code under test may catch it."""


@pytest.mark.parametrize("stage", ["replace_text", "remove_folder"])
def test_a_crash_while_a_folder_is_replaced_loses_nothing(tmp_path, monkeypatch, stage):
    """Before model.json names the new weights, and before the old ones are gone."""
    path = tmp_path / "model"
    old, new, newer = (_tiny(seed=seed) for seed in range(3))
    save_model(path, old)
    with monkeypatch.context() as patch:
        calls = []
        plain = getattr(storage, stage)

        def crash(*arguments):
            calls.append(arguments)
            if stage == "replace_text" or len(calls) == 2:  # the first makes room for the new ones
                raise _Crash
            plain(*arguments)

        patch.setattr(storage, stage, crash)
        # A killed process clears up nothing.
        patch.setattr(model_folder, "_clear", lambda *_, **__: None)
        with pytest.raises(_Crash):
            save_model(path, new, replace=True)
    for reader in (path, tmp_path):
        _assert_equal(load_model(reader), old if stage == "replace_text" else new)
    assert "name another folder" in refusal(save_model, path, newer)
    save_model(path, newer, replace=True)
    _assert_equal(load_model(path), newer)
    assert len(list(path.iterdir())) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_crash_while_the_first_model_is_written_stops_nobody(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(model_folder, "_clear", lambda *_, **__: None)
        patch.setattr(storage, "replace_text", lambda *_: (_ for _ in ()).throw(_Crash))
        with pytest.raises(_Crash):
            save_model(tmp_path / "model", _tiny())
    assert find_model(tmp_path) is None
    save_model(tmp_path / "model", _tiny())
    _assert_equal(load_model(tmp_path), _tiny())


def test_a_folder_of_other_things_is_never_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("Once upon a time")
    message = refusal(save_model, tmp_path / "thesis", _tiny())
    assert f"{tmp_path / 'thesis'} exists and is not a model folder" in message
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "Once upon a time"


def test_paths_relative_to_the_present_folder(tmp_path, monkeypatch):
    save_model(tmp_path / "model", _tiny())
    monkeypatch.chdir(tmp_path)
    assert read_info("model") == read_info(".") == read_info(tmp_path)
    monkeypatch.chdir(tmp_path / "model")
    assert find_model(".") == tmp_path / "model"


def test_the_weights_alone_of_a_training_checkpoint(tmp_path):
    info, state = _state()
    with _open(tmp_path) as checkpoints:
        _save(checkpoints, info, state, 7)
    step = tmp_path / "checkpoints" / "7"
    for ema, kept in ((False, state.model), (True, state.ema)):
        model = load_checkpoint(step, ema=ema)
        assert model.info == dataclasses.replace(info, weights="ema" if ema else info.weights)
        _assert_equal(split_model(model)[1], kept)
    for wrong in (tmp_path, tmp_path / "checkpoints" / "8"):
        assert f"{wrong} is not a training checkpoint (No such file" in refusal(
            load_checkpoint, wrong
        )
    (step / "state" / "_METADATA").write_bytes(b"{")
    assert f"{step} cannot be read" in refusal(load_checkpoint, step)
    (step / "meta" / "metadata").write_text("{}")
    assert f"{step} is damaged" in refusal(load_checkpoint, step)


def test_no_model_folder(tmp_path):
    for action in (read_info, load_model, lambda path: model_folder.read_variables(path, None)):
        assert f"{tmp_path / 'none'} is not a model folder" in refusal(action, tmp_path / "none")
    assert find_model(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:40], "model.json is damaged"),
        (lambda text: "[1, 2]", "model.json is damaged"),
        (lambda text: text.replace('"num_classes"', '"classes"'), "model.json is damaged"),
        (lambda text: text.replace('"format": 2', '"format": 99'), "has format 99, expected 2"),
        (
            lambda text: text.replace('"image_size": 32', '"image_size": "32"'),
            "image_size is '32', expected a whole",
        ),
        (lambda text: text.replace('"std": [', '"std": [0.1, '), "std is (0.1, "),
        (
            lambda text: text.replace('"deit_testing"', '"deit_tasting"'),
            "not agree with its digest",
        ),
        (lambda text: text.replace('"digest"', '"digits"'), "no field 'digits'"),
        (lambda text: text.replace('"checksums"', '"sums"'), "no field 'sums'"),
        (lambda text: text.replace('"depth"', '"dephts"'), "dephts"),
    ],
)
def test_damaged_model_json_is_one_line_that_names_it(tmp_path, change, words):
    save_model(tmp_path / "model", _tiny())
    file = tmp_path / "model" / "model.json"
    text = file.read_text(encoding="utf-8")
    assert change(text) != text
    file.write_text(change(text), encoding="utf-8")
    message = refusal(load_model, tmp_path / "model")
    assert words in message
    assert str(file) in message


def _cut(file):
    file.write_bytes(file.read_bytes()[:50])


def _largest(folder):
    return max(folder.rglob("?" * 32), key=lambda path: path.stat().st_size)


# Orbax gives up at the first array; the readers of the others then miss its event loop.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "damage",
    [
        shutil.rmtree,
        lambda weights: (weights / "manifest.ocdbt").unlink(),
        lambda weights: _cut(weights / "manifest.ocdbt"),
        lambda weights: _cut(_largest(weights)),
        lambda weights: shutil.rmtree(weights / "ocdbt.process_0"),
    ],
)
def test_damaged_weights_are_one_line_that_names_the_folder(tmp_path, damage):
    save_model(tmp_path / "model", _tiny())
    weights = tmp_path / "model" / "weights"
    damage(weights)
    message = refusal(load_model, tmp_path / "model")
    assert message.startswith(f"{weights} cannot be read (")
    assert "NoneType" not in message
    assert len(message) < 500


def test_weights_of_another_model_are_named(tmp_path):
    save_model(tmp_path / "ours", _tiny())
    save_model(tmp_path / "other", _tiny(num_classes=4))
    shutil.rmtree(tmp_path / "ours" / "weights")
    shutil.copytree(tmp_path / "other" / "weights", tmp_path / "ours" / "weights")
    message = refusal(load_model, tmp_path / "ours")
    assert "params/head/kernel has shape (8, 4), expected (8, 3)" in message
    assert str(tmp_path / "ours") in message


# Training checkpoints


def _state(*, seed=0, ema=True, optimizer=None, **options):
    network, variables = split_model(_tiny(seed=seed, **options))
    state = new_state(variables, optimizer or optax.adamw(1e-3), ema=ema)
    # Moments and average away from their initial values, or a restore that skips them would pass.
    rng = np.random.default_rng(seed + 100)

    def noisy(x):
        return x + (rng.standard_normal(x.shape).astype(x.dtype) if x.ndim else seed)

    state = state.replace(
        opt_state=jax.tree.map(noisy, state.opt_state), ema=jax.tree.map(noisy, state.ema)
    )
    return network.info, jax.tree.map(jax.numpy.asarray, state)


def _open(workdir, *, keep=2, **options):
    return contextlib.closing(TrainCheckpoints(workdir, keep=keep, **options))


def _save(checkpoints, info, state, step, best=None):
    best = {"top1": 61.5, "step": step if best is None else best}
    checkpoints.save(state, info, step=step, best=best)


def _steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def _abstract(state):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


@pytest.mark.parametrize("ema", [True, False])
def test_restore_is_exact_with_optimiser_and_average(tmp_path, ema):
    info, state = _state(seed=3, ema=ema, depth=11)
    state = state.replace(step=jax.numpy.int32(17), nonfinite_total=jax.numpy.int32(2))
    with _open(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.check(info, ema=ema)  # nothing there: nothing against it
        checkpoints.save(state, info, step=17, best={"top1": 61.5, "step": 12})
    with _open(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 17
        checkpoints.check(info, ema=ema)
        restored, best, step = checkpoints.restore(_abstract(state))
    assert step == 17
    assert best == {"top1": 61.5, "step": 12}
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    _assert_equal(restored, state)


def test_the_latest_and_the_best_are_kept(tmp_path):
    info, state = _state()
    with _open(tmp_path) as checkpoints:
        for step, best in ((1, -1), (2, 1), (3, 2), (4, 2), (5, 2), (6, 2)):
            _save(checkpoints, info, state, step, best)
    assert _steps(tmp_path) == [2, 5, 6]
    with _open(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest_step() == 6
        _save(checkpoints, info, state, 7, best=2)
    assert _steps(tmp_path) == [2, 7]
    with _open(tmp_path, keep=1) as checkpoints:
        _save(checkpoints, info, state, 8, best=7)
    assert _steps(tmp_path) == [7, 8]


@pytest.mark.parametrize("metrics", ['{"top1": 50.0}', "damaged"])
def test_a_run_of_an_earlier_version_goes_on(tmp_path, metrics):
    """Which evaluated before it saved, and kept the top-1 in each checkpoint for Orbax."""
    info, state = _state()
    with ocp.CheckpointManager(
        tmp_path / "checkpoints", options=ocp.CheckpointManagerOptions(best_fn=lambda x: x["top1"])
    ) as manager:
        for step, top1 in ((1, 50.0), (2, 10.0)):
            meta = {"model": info.to_json(), "ema": True, "best": {"top1": 50.0, "step": 1}}
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
            )
            manager.save(step, args=args, metrics={"top1": top1})
    for step in (1, 2):
        (tmp_path / "checkpoints" / str(step) / "metrics" / "metrics").write_text(metrics)
    with _open(tmp_path, keep=1) as checkpoints:
        restored, best, step = checkpoints.restore(_abstract(state))
        assert (best, step) == ({"top1": 50.0, "step": 1}, 2)
        _assert_equal(restored, state)
        checkpoints.save(state, info, step=3, best=best)
    assert _steps(tmp_path) == [1, 3]


def test_saving_a_step_twice_is_harmless(tmp_path):
    info, first = _state(seed=1)
    _, second = _state(seed=2)
    with _open(tmp_path) as checkpoints:
        _save(checkpoints, info, first, 5)
        _save(checkpoints, info, second, 5)  # the first may still be on its way to the disk
    with _open(tmp_path) as checkpoints:
        _save(checkpoints, info, second, 5)
        _assert_equal(checkpoints.restore(_abstract(first))[0], first)
    assert _steps(tmp_path) == [5]


def test_an_interrupted_save_is_ignored(tmp_path):
    """What a killed process leaves: a folder under a temporary name, complete or not."""
    info, state = _state()
    with _open(tmp_path) as checkpoints:
        _save(checkpoints, info, state, 5)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "5", folder / "9.orbax-checkpoint-tmp")
    (folder / "8.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with _open(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 5
        _assert_equal(checkpoints.restore(_abstract(state))[0], state)
        _save(checkpoints, info, state, 9)
    with _open(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 9


@pytest.mark.parametrize(
    ("options", "ema", "words"),
    [
        ({"depth": 2}, True, "overrides"),
        ({"image_size": 64}, True, "image_size 32, but the config asks for 64"),
        ({}, False, "was saved with an EMA, but config.train.ema_decay"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, options, ema, words):
    info, state = _state()
    with _open(tmp_path) as checkpoints:
        _save(checkpoints, info, state, 5)
    other = _tiny(**options).info
    with _open(tmp_path) as checkpoints:
        message = refusal(lambda: checkpoints.check(other, ema=ema))
        assert words in message
        assert str(tmp_path / "checkpoints" / "5") in message


def _freezing(*frozen):
    mask = {name: name not in frozen for name in _state()[1].model.params}
    return optax.masked(optax.adamw(1e-3), mask)


@pytest.mark.parametrize(
    ("optimizer", "other", "words"),
    [
        (None, optax.sgd(0.1, momentum=0.9), "opt_state/0/mu"),
        # Orbax lets parameters that had no moments, being frozen, pass for ones that have.
        (
            _freezing("blocks", "pos_embed"),
            _freezing("blocks", "cls_token"),
            "cls_token float32[1, 1, 8]",
        ),
    ],
)
def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path, optimizer, other, words):
    """And not taken for damaged: it stays."""
    info, state = _state(optimizer=optimizer)
    with _open(tmp_path) as checkpoints:
        _save(checkpoints, info, state, 5)
    with _open(tmp_path) as checkpoints:
        message = refusal(checkpoints.restore, _abstract(_state(optimizer=other)[1]))
    assert f"{tmp_path / 'checkpoints' / '5'} holds another optimizer's state" in message
    assert words in message
    with _open(tmp_path) as checkpoints:
        _assert_equal(checkpoints.restore(_abstract(state))[0], state)
