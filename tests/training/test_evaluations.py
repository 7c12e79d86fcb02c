"""Saves, evaluations and the best model in a run that is killed and stopped between all of them."""

import json
import os
import signal

import jax
import numpy as np
import pytest
from flax import nnx

import deit_jax
from configs import digits
from deit_jax.checkpoints import model_folder
from deit_jax.checkpoints.training import TrainCheckpoints
from deit_jax.errors import Preempted
from deit_jax.parallel import preemption
from deit_jax.training import loop, metrics
from tests import kill_and_resume

LAST = 33  # evaluated after steps 11, 22 and 33, saved after 22 and 33


class Killed(BaseException):
    """In the place of SIGKILL."""


pytestmark = pytest.mark.usefixtures("small_models")


def config():
    chosen = digits.get_config()
    chosen.update_from_flattened_dict(
        {
            "dataset.train_fraction": 0.125,
            "train.batch_size": 16,
            "schedule.epochs": 3,
            "schedule.warmup_epochs": 1,
            "train.log_every_steps": 1,
            "train.eval_every_epochs": 1,
            "checkpoint.every_epochs": 0,
            "checkpoint.every_steps": 22,
        }
    )
    return chosen


class Events:
    """What a run does, one word an event; strikes after the one that it is told."""

    def __init__(self, patch):
        self.seen, self._after, self._blow = [], None, None
        for place, name, word in (
            (preemption.StopSignal, "check", lambda *_: "batch"),
            (TrainCheckpoints, "save", lambda *_, **options: f"save {options['step']}"),
            (model_folder, "write_model", lambda path, *_: f"write {os.path.basename(path)}"),
            (metrics.MetricWriter, "write", lambda _, step, split, *__, **___: f"{split} {step}"),
        ):
            patch.setattr(place, name, self._noting(getattr(place, name), word))

    def _noting(self, function, word):
        def noted(*arguments, **options):
            event = word(*arguments, **options)
            if event == "batch":  # what a signal during the batch does is seen here
                self._note(event)
                return function(*arguments, **options)
            result = function(*arguments, **options)
            self._note(event)
            return result

        return noted

    def _note(self, event):
        self.seen.append(event)
        if event == self._after:
            self._after = None
            if self._blow is Preempted:
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                raise self._blow

    def strike(self, after, blow):
        self.seen, self._after, self._blow = [], after, blow


def _rates_apart(workdir):
    rates = ("images_per_second", "input_wait", "eta_seconds")
    return [
        {name: value for name, value in line.items() if name not in rates}
        for line in kill_and_resume.metrics(workdir)
    ]


@pytest.fixture(scope="module")
def peace(tmp_path_factory):
    """The workdir of a run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "peace"
    loop.train(config(), str(workdir))
    return workdir


# After which event, what comes, at which step the next start resumes, and what it does first.
BLOWS = [
    ("batch", Preempted, 11, ["batch"]),  # the save was not due: it is made
    ("batch", Killed, 11, ["batch"]),
    ("write best", Killed, 11, ["batch"]),
    ("eval 11", Killed, 11, ["train 12"]),
    ("save 22", Killed, 22, ["batch"]),
    ("eval 22", Preempted, 22, ["train 23"]),
    ("save 33", Preempted, 33, ["batch"]),
    ("eval 33", Killed, 33, ["write model"]),
    ("write model", Killed, 33, ["write model"]),
]


@pytest.mark.slow
def test_no_moment_of_a_stop_changes_anything(peace, tmp_path, monkeypatch, capsys):
    """Arrays, metrics, best, final models and the checkpoints that are kept: all to the bit."""
    events, workdir = Events(monkeypatch), tmp_path / "run"
    first = ["train 1"]
    for after, blow, step, next_first in BLOWS:
        events.strike(after, blow)
        with pytest.raises(blow):
            loop.train(config(), str(workdir))
        assert events.seen[0] == first[0]
        assert events.seen[-1] == after or (blow, events.seen[-1]) == (Preempted, "save 11")
        assert kill_and_resume.newest_step(workdir) == step
        first = next_first
    capsys.readouterr()
    loop.train(config(), str(workdir))
    assert f"step {LAST}: eval" in capsys.readouterr().out
    assert not kill_and_resume.compare(peace, workdir)
    assert _rates_apart(workdir) == _rates_apart(peace)
    for name in ("model", "model_ema", "best"):
        ours, theirs = (nnx.state(deit_jax.load_model(run / name)) for run in (workdir, peace))
        assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs)), name
    steps = [
        sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (workdir, peace)
    ]
    assert steps[0] == steps[1]
    metas = [
        json.loads((run / "checkpoints" / str(LAST) / "meta" / "metadata").read_text())
        for run in (workdir, peace)
    ]
    assert metas[0]["best"] == metas[1]["best"]
