"""Several processes train and evaluate as one does, and stop together."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from tests import chaos, several

NUM_EVAL = 1003  # neither two nor three processes divide it, nor does the batch


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Six steps on small images, with everything random, in groups that every layout can keep."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 150), ("val", NUM_EVAL)):
        for number in range(count):
            name = ("bird", "boat", "dog")[number % 3]
            (root / split / name).mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            image.save(root / split / name / f"{number}.png")
    return [
        "--config=configs/digits.py",
        "--config.dataset.source=folder",
        f"--config.dataset.root={root}",
        "--config.dataset.eval_split=val",
        "--config.schedule.epochs=2",
        "--config.schedule.warmup_epochs=1",
        "--config.mixing.random_erasing=0.25",
        "--config.mixing.group_size=2",
        "--config.model.drop_path_rate=0.1",
        "--config.train.batch_size=48",
        "--config.train.log_every_steps=1",
        "--config.train.eval_every_epochs=0",
        "--config.checkpoint.every_epochs=0",
    ]


def results(recipe, workdir, *, processes, devices):
    """The losses of all steps, and the final report."""
    flags = [*recipe, f"--workdir={workdir}"]
    ended = several.run(flags, processes=processes, devices=devices)
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


@pytest.mark.parametrize(("processes", "devices"), [(2, 4), (3, 1)])
def test_processes_train_and_evaluate_as_one(recipe, alone, tmp_path, processes, devices):
    """Losses to 1e-6, drop-path, erasing and mixup on; every one of 1,003 images counts once."""
    losses, final = results(recipe, tmp_path, processes=processes, devices=devices)
    assert len(losses) == 6
    assert losses == pytest.approx(alone[0], rel=1e-6)
    assert final["num_examples"] == alone[1]["num_examples"] == NUM_EVAL
    for name in ("top1", "top5", "ema_top1", "ema_top5"):
        assert final[name] == alone[1][name], name
    for name in ("loss", "ema_loss"):
        assert final[name] == pytest.approx(alone[1][name], rel=1e-6)


def test_chaos_changes_no_bit(tmp_path, capsys):
    """Kill one process; stop one in training, and both with it; stop one in set-up."""
    problems, rounds = chaos.run(3, 90, tmp_path)
    assert not problems
    assert rounds == 3
    printed = capsys.readouterr().out
    assert "SIGKILL to 1 after step" in printed
    assert re.search(r"SIGTERM to 1 after step .* with \[0, 0\]", printed)
    assert re.search(r"SIGTERM to 1 after no step, .* with \[0, 0\]", printed)
