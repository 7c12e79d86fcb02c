"""Several processes train and evaluate as one does, and stop together."""

import json
import re

import jax
import numpy as np
import pytest
from flax import nnx

import deit_jax
from deit_jax.models import registry
from tests import chaos, several, small_main

pytestmark = pytest.mark.multihost

NUM_EVAL = 1003  # neither two nor three processes divide it, nor does the batch


@pytest.mark.slow
def test_chaos_changes_no_bit(tmp_path, capsys):
    """Stop one process in an evaluation, and both with it; kill one in a save."""
    assert chaos.run(2, 487, tmp_path, small_main.SCRIPT) == ([], 2)
    printed = capsys.readouterr().out
    assert re.search(r"SIGTERM to 1 in an evaluation after step \d+, .* with \[75, 75\]", printed)
    assert "SIGKILL to 1 in a save after step" in printed


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Six steps, with everything random, in groups that every layout can keep."""
    return several.image_recipe(tmp_path_factory.mktemp("images"), num_eval=NUM_EVAL)


def results(recipe, workdir, *, processes, devices):
    """The losses of all steps, and the final report."""
    flags = [*recipe, f"--workdir={workdir}"]
    ended = several.run(flags, processes=processes, devices=devices, script=small_main.SCRIPT)
    for process in ended:
        assert process.returncode == 0, process.stderr
    assert f"on {processes * devices} cpu device(s), {processes} process(es)" in ended[0].stdout
    assert all("Final report" not in process.stdout for process in ended[1:])
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    final = next(line for line in lines if line["split"] == "final")
    return [line["loss"] for line in lines if line["split"] == "train"], final


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory):
    """The run in one process with eight devices."""
    return results(recipe, tmp_path_factory.mktemp("alone"), processes=1, devices=8)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 4), (3, 1)])
def test_processes_train_and_evaluate_as_one(
    recipe, alone, tmp_path, monkeypatch, processes, devices
):
    """Losses to 1e-6, drop-path, erasing and mixup on; every one of 1,003 images counts once."""
    losses, final = results(recipe, tmp_path, processes=processes, devices=devices)
    assert len(losses) == 6
    assert losses == pytest.approx(alone[0], rel=1e-6)
    assert final["num_examples"] == alone[1]["num_examples"] == NUM_EVAL
    for name in ("top1", "top5", "ema_top1", "ema_top5"):
        assert final[name] == alone[1][name], name
    for name in ("loss", "ema_loss"):
        assert final[name] == pytest.approx(alone[1][name], rel=1e-6)
    monkeypatch.setattr(registry, "_MODELS", small_main.models())
    for folder, ema in (("model", False), ("model_ema", True)):
        whole = nnx.state(deit_jax.load_model(tmp_path / folder))
        part = nnx.state(deit_jax.load_checkpoint(tmp_path / "checkpoints" / "6", ema=ema))
        assert jax.tree.all(jax.tree.map(np.array_equal, part, whole))


@pytest.mark.slow
def test_pmap_in_two_processes_as_the_mesh_in_one(recipe, alone, tmp_path):
    """And what process 1 could not read, number 40 of the first 48 for evaluation, is counted."""
    flags = several.image_recipe(tmp_path / "images", num_eval=NUM_EVAL)
    sorted((tmp_path / "images" / "val").rglob("*.png"))[40].write_bytes(b"")
    flags += ["--config.input.on_bad_image=skip", "--config.parallel.backend=pmap"]
    losses, final = results(flags, tmp_path / "run", processes=2, devices=1)
    assert losses == pytest.approx(alone[0], rel=1e-6)
    assert (final["num_examples"], final["skipped_images"]) == (NUM_EVAL - 1, 1)
    assert final["top1"] == pytest.approx(alone[1]["top1"], abs=100 / NUM_EVAL)
