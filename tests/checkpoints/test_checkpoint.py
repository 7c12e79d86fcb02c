"""Training checkpoints: exact round trips, what is kept, interrupted saves, other models."""

import dataclasses
import re
import shutil
from pathlib import Path

import jax
import optax
import orbax.checkpoint as ocp
import pytest

from deit_jax.checkpoints.model_folder import load_checkpoint
from deit_jax.models.network import split_model
from tests.checkpoints.saved import abstract, assert_equal, opened, random_state, save, tiny
from tests.refusal import refusal


def _steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_the_weights_alone_of_a_training_checkpoint(tmp_path):
    info, state = random_state()
    with opened(tmp_path) as checkpoints:
        save(checkpoints, info, state, 7)
    step = tmp_path / "checkpoints" / "7"
    for ema, kept in ((False, state.model), (True, state.ema)):
        model = load_checkpoint(step, ema=ema)
        assert model.info == dataclasses.replace(info, weights="ema" if ema else info.weights)
        assert_equal(split_model(model)[1], kept)
    for wrong in (tmp_path, tmp_path / "checkpoints" / "8"):
        assert f"{wrong} is not a training checkpoint (No such file" in refusal(
            load_checkpoint, wrong
        )
    (step / "state" / "_METADATA").write_bytes(b"{")
    assert f"{step} cannot be read" in refusal(load_checkpoint, step)
    for text in ("{}", "[" * 100_000):
        (step / "meta" / "metadata").write_text(text)
        assert f"{step} is damaged" in refusal(load_checkpoint, step)


def test_opening_a_workdir_reads_little_of_its_checkpoints(tmp_path):
    """Their bytes are looked at when they are restored, and not before."""
    info, state = random_state(embed_dim=256, depth=4)
    with opened(tmp_path) as checkpoints:
        save(checkpoints, info, state, 1)
    size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    before = _bytes_read()
    with opened(tmp_path) as checkpoints:
        checkpoints.check(info, ema=True)
        assert _bytes_read() - before < size / 20
        checkpoints.restore(abstract(state))
        assert _bytes_read() - before > size / 2


def _bytes_read():
    """What this process has asked the kernel to read so far."""
    (count,) = re.findall(r"^rchar: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    return int(count)


@pytest.mark.parametrize("ema", [True, False])
def test_restore_is_exact_with_optimiser_and_average(tmp_path, ema):
    info, state = random_state(seed=3, ema=ema, depth=11)
    state = state.replace(step=jax.numpy.int32(17), nonfinite_total=jax.numpy.int32(2))
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.check(info, ema=ema)  # nothing there: nothing against it
        checkpoints.save(state, info, step=17, best={"top1": 61.5, "step": 12})
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 17
        checkpoints.check(info, ema=ema)
        restored, best, step = checkpoints.restore(abstract(state))
    assert step == 17
    assert best == {"top1": 61.5, "step": 12}
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert_equal(restored, state)


def test_the_latest_and_the_best_are_kept(tmp_path):
    info, state = random_state()
    with opened(tmp_path) as checkpoints:
        for step, best in ((1, -1), (2, 1), (3, 2), (4, 2), (5, 2), (6, 2)):
            save(checkpoints, info, state, step, best)
    assert _steps(tmp_path) == [2, 5, 6]
    with opened(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest_step() == 6
        save(checkpoints, info, state, 7, best=2)
    assert _steps(tmp_path) == [2, 7]
    with opened(tmp_path, keep=1) as checkpoints:
        save(checkpoints, info, state, 8, best=7)
    assert _steps(tmp_path) == [7, 8]


@pytest.mark.parametrize("metrics", ['{"top1": 50.0}', "damaged"])
def test_a_run_of_an_earlier_version_goes_on(tmp_path, metrics):
    """Which evaluated before it saved, and kept the top-1 in each checkpoint for Orbax."""
    info, state = random_state()
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
    with opened(tmp_path, keep=1) as checkpoints:
        restored, best, step = checkpoints.restore(abstract(state))
        assert (best, step) == ({"top1": 50.0, "step": 1}, 2)
        assert_equal(restored, state)
        checkpoints.save(state, info, step=3, best=best)
    assert _steps(tmp_path) == [1, 3]


def test_saving_a_step_twice_is_harmless(tmp_path):
    info, first = random_state(seed=1)
    _, second = random_state(seed=2)
    with opened(tmp_path) as checkpoints:
        save(checkpoints, info, first, 5)
        save(checkpoints, info, second, 5)  # the first may still be on its way to the disk
    with opened(tmp_path) as checkpoints:
        save(checkpoints, info, second, 5)
        assert_equal(checkpoints.restore(abstract(first))[0], first)
    assert _steps(tmp_path) == [5]


def test_an_interrupted_save_is_ignored(tmp_path):
    """What a killed process leaves: a folder under a temporary name, complete or not."""
    info, state = random_state()
    with opened(tmp_path) as checkpoints:
        save(checkpoints, info, state, 5)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "5", folder / "9.orbax-checkpoint-tmp")
    (folder / "8.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 5
        assert_equal(checkpoints.restore(abstract(state))[0], state)
        save(checkpoints, info, state, 9)
    with opened(tmp_path) as checkpoints:
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
    info, state = random_state()
    with opened(tmp_path) as checkpoints:
        save(checkpoints, info, state, 5)
    other = tiny(**options).info
    with opened(tmp_path) as checkpoints:
        message = refusal(lambda: checkpoints.check(other, ema=ema))
        assert words in message
        assert str(tmp_path / "checkpoints" / "5") in message


def _freezing(*frozen):
    mask = {name: name not in frozen for name in random_state()[1].model.params}
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
    info, state = random_state(optimizer=optimizer)
    with opened(tmp_path) as checkpoints:
        save(checkpoints, info, state, 5)
    with opened(tmp_path) as checkpoints:
        message = refusal(checkpoints.restore, abstract(random_state(optimizer=other)[1]))
    assert f"{tmp_path / 'checkpoints' / '5'} holds another optimizer's state" in message
    assert words in message
    with opened(tmp_path) as checkpoints:
        assert_equal(checkpoints.restore(abstract(state))[0], state)
