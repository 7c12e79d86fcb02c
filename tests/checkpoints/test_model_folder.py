"""Model folders: exact round trips, crashes, damage, foreign weights."""

import dataclasses
import errno
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest

from deit_jax import storage, trees
from deit_jax.checkpoints import model_folder
from deit_jax.checkpoints.model_folder import (
    find_model,
    load_model,
    read_info,
    save_model,
)
from deit_jax.errors import TransientError
from deit_jax.models.network import split_model
from tests.checkpoints.saved import (
    TINY,
    assert_equal,
    random_model,
    tiny,
)
from tests.refusal import refusal


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
    model = random_model(name, **options)
    save_model(tmp_path / "deep" / "model", model)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"]
    loaded = load_model(tmp_path / "deep" / "model")
    assert_equal(loaded, model)
    assert loaded.info == model.info
    assert_equal(load_model(tmp_path / "deep"), model)  # a run folder holds its model

    # The lines that docs/checkpoints.md shows to people without deit_jax.
    tree = ocp.PyTreeCheckpointer().restore(tmp_path / "deep" / "model" / "weights")
    plain = {**trees.flat(tree["params"]), **trees.flat(tree.get("batch_stats") or {})}
    variables = split_model(model)[1]
    expected = {**trees.flat(variables.params), **trees.flat(variables.batch_stats)}
    assert plain.keys() == expected.keys()
    for leaf, array in expected.items():
        np.testing.assert_array_equal(plain[leaf], array, err_msg=leaf)


def test_model_json_says_all_that_prediction_needs(tmp_path):
    model = tiny()
    model.info = dataclasses.replace(
        model.info, class_names=("Affe", "Bär", "猫"), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6),
        crop_ratio=None, interpolation="bilinear", source="a test", weights="ema",
    )  # fmt: skip
    save_model(tmp_path / "model", model)
    assert "Bär" in (tmp_path / "model" / "model.json").read_text(encoding="utf-8")
    assert read_info(tmp_path / "model") == load_model(tmp_path / "model").info == model.info


class _Crash(BaseException):
    """Stands for a kill: nothing in the code under test may catch it."""


def _kill(patch):
    """Ends a process: it clears up nothing."""

    def crash(*_):
        raise _Crash

    patch.setattr(storage, "remove_folder", crash)
    crash()


@pytest.mark.parametrize("stage", ["replace_text", "remove_folder"])
def test_a_crash_while_a_folder_is_replaced_loses_nothing(tmp_path, monkeypatch, stage):
    """Before model.json names the new weights, and before the old ones are gone."""
    path = tmp_path / "model"
    old, new, newer = (tiny(seed=seed) for seed in range(3))
    save_model(path, old)
    with monkeypatch.context() as patch:
        calls = []
        plain = getattr(storage, stage)

        def crash(*arguments):
            calls.append(arguments)
            if stage == "replace_text" or len(calls) == 2:  # the first makes room for the new ones
                _kill(patch)
            plain(*arguments)

        patch.setattr(storage, stage, crash)
        with pytest.raises(_Crash):
            save_model(path, new, replace=True)
    for reader in (path, tmp_path):
        assert_equal(load_model(reader), old if stage == "replace_text" else new)
    assert "name another folder" in refusal(save_model, path, newer)
    save_model(path, newer, replace=True)
    assert_equal(load_model(path), newer)
    assert len(list(path.iterdir())) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "as a disk says")])
def test_what_fails_once_the_new_model_counts_leaves_it(tmp_path, monkeypatch, error):
    """The old weights are going: clearing up the new ones would lose both."""
    path, plain = tmp_path / "model", storage.remove_folder
    save_model(path, tiny(seed=1))

    def fail(folder):
        if folder == path / "weights":
            raise error
        plain(folder)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove_folder", fail)
        with pytest.raises((KeyboardInterrupt, TransientError)):
            save_model(path, tiny(seed=2), replace=True)
    assert_equal(load_model(path), tiny(seed=2))


def test_a_crash_while_the_first_model_is_written_stops_nobody(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(storage, "replace_text", lambda *_: _kill(patch))
        with pytest.raises(_Crash):
            save_model(tmp_path / "model", tiny())
    assert find_model(tmp_path) is None
    save_model(tmp_path / "model", tiny())
    assert_equal(load_model(tmp_path), tiny())


def test_a_folder_of_other_things_is_never_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("Once upon a time")
    message = refusal(save_model, tmp_path / "thesis", tiny())
    assert f"{tmp_path / 'thesis'} exists and is not a model folder" in message
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "Once upon a time"


def test_paths_relative_to_the_present_folder(tmp_path, monkeypatch):
    save_model(tmp_path / "model", tiny())
    monkeypatch.chdir(tmp_path)
    assert read_info("model") == read_info(".") == read_info(tmp_path)
    monkeypatch.chdir(tmp_path / "model")
    assert find_model(".") == tmp_path / "model"


def test_no_model_folder(tmp_path):
    for action in (read_info, load_model, lambda path: model_folder.read_variables(path, None)):
        assert f"{tmp_path / 'none'} is not a model folder" in refusal(action, tmp_path / "none")
    assert find_model(tmp_path) is None


def test_weights_of_pytorch_are_to_be_converted_first(tmp_path):
    file, published = tmp_path / "a.safetensors", "hf:timm/deit3_base_patch16_224.fb_in1k"
    file.touch()
    for name, source in (
        (file, file),
        ("hf:timm/resnet50", "hf:timm/resnet50"),
        ("https://host/a.pth", "https://host/a.pth"),
        ("deit3_base_patch16_224", published),
        ("timm/deit3_base_patch16_224.fb_in1k", published),
    ):
        line = refusal(read_info, name)
        assert f"convert it first: deit-jax convert --src {source} --dst FOLDER" in line


def test_a_training_checkpoint_is_no_model_folder(tmp_path):
    for part in ("state", "meta"):
        (tmp_path / "checkpoints" / "7" / part).mkdir(parents=True)
    message = refusal(read_info, tmp_path / "checkpoints" / "7")
    assert f"is a training checkpoint; name the run, {tmp_path}, or" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:40], "model.json is damaged"),
        (lambda text: "[1, 2]", "model.json is damaged"),
        (lambda text: "[" * 100_000, "nested more than 100 deep"),
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
    save_model(tmp_path / "model", tiny())
    file = tmp_path / "model" / "model.json"
    text = file.read_text(encoding="utf-8")
    assert change(text) != text
    file.write_text(change(text), encoding="utf-8")
    message = refusal(load_model, tmp_path / "model")
    assert words in message
    assert str(file) in message
    save_model(tmp_path / "model", tiny(seed=1), replace=True)
    assert_equal(load_model(tmp_path / "model"), tiny(seed=1))


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
    save_model(tmp_path / "model", tiny())
    weights = tmp_path / "model" / "weights"
    damage(weights)
    message = refusal(load_model, tmp_path / "model")
    assert message.startswith(f"{weights} cannot be read (")
    assert "NoneType" not in message
    assert len(message) < 500


def test_weights_of_another_model_are_named(tmp_path):
    save_model(tmp_path / "ours", tiny())
    save_model(tmp_path / "other", tiny(num_classes=4))
    shutil.rmtree(tmp_path / "ours" / "weights")
    shutil.copytree(tmp_path / "other" / "weights", tmp_path / "ours" / "weights")
    message = refusal(load_model, tmp_path / "ours")
    assert "params/head/kernel has shape (8, 4), expected (8, 3)" in message
    assert str(tmp_path / "ours") in message
