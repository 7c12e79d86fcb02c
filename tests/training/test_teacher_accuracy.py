"""The teacher's accuracy is evaluated once, and again where anything that it depends on differs."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from configs import digits_distill
from deit_jax.models import registry
from deit_jax.models.network import split_model
from deit_jax.models.regnet_folded import fold
from deit_jax.parallel.preemption import StopSignal
from deit_jax.training import teacher


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(changes) → whether the teacher was evaluated at that start of the run."""
    network, like = split_model(registry.abstract_model("regnety_testing", num_classes=10))
    evaluated = []

    def evaluator(*_):
        evaluated.append(1)
        return lambda _: {"top1": 96.6573816155989}

    monkeypatch.setattr(teacher, "split_evaluator", evaluator)

    def run(*, bit=False, folded=False, mean=None, split="0123", config=None, training=True):
        evaluated.clear()
        weights = jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), like)
        if bit:
            jax.tree.leaves(weights)[-1].view(np.uint32).flat[-1] ^= 1
        info = dataclasses.replace(network.info, mean=mean or network.info.mean)
        chosen = digits_distill.get_config()
        chosen.update_from_flattened_dict(config or {})
        of = types.SimpleNamespace(
            config=chosen,
            workdir=str(tmp_path),
            train_source="images" if training else None,
            eval_source=types.SimpleNamespace(fingerprint=lambda: split),
        )
        shown = dataclasses.replace(network, info=info)
        if folded:
            shown, weights = fold(shown, weights)
        found = teacher.teacher_accuracy(of, shown, weights, StopSignal())
        assert found == {"teacher_top1": 96.6573816155989}
        return bool(evaluated)

    return run


@pytest.mark.parametrize(
    "changes",
    [
        {"bit": True},
        {"folded": True},  # as on a TPU
        {"mean": (0.1, 0.2, 0.3)},
        {"split": "0124"},
        {"config": {"input.image_size": 40}},
        {"config": {"input.interpolation": "bilinear"}},
        {"config": {"input.on_bad_image": "skip"}},
        {"config": {"train.dtype": "bfloat16"}},
    ],
)
def test_it_is_kept_for_what_it_was_measured_on(start, changes):
    assert start()
    assert not start()
    assert not start(config={"input.auto_augment": "rand-m9", "train.seed": 7})
    assert start(training=False, **changes)  # an evaluation leaves the run's figure alone
    assert not start()
    assert start(**changes)
    assert not start(**changes)
    assert start()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"digest": 3}', "[" * 100_000, "\xff"])
def test_a_damaged_file_is_as_good_as_none(start, tmp_path, text):
    start()
    (tmp_path / "teacher_accuracy.json").write_text(text, encoding="latin-1")
    assert start()
    assert not start()
