"""Evaluation: hand-computed accuracies of a network whose logits are known, and a NumPy oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deit_jax.models.registry import ModelInfo
from deit_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from deit_jax.training import evaluate as evaluation
from deit_jax.training.evaluate import evaluate, make_eval_step


@dataclasses.dataclass(frozen=True)
class _Lookup:
    """A network whose logits are rows of its "weights": pixel 0 of an image is the row's number."""

    info: ModelInfo

    def __call__(self, tables, images):
        rows = jnp.round(images[:, 0, 0, 0]).astype(int)
        return tuple(table[rows] for table in tables), {}


def _batch(rows, labels, mask=None):
    return {
        "image": np.broadcast_to(np.uint8(rows)[:, None, None, None], (len(rows), 1, 1, 3)).copy(),
        "label": np.int32(labels),
        "mask": np.float32([1] * len(rows) if mask is None else mask),
    }


def _run(weights, batches, num_classes, check=lambda: None):
    mesh = make_mesh()
    # Normalising by these leaves the pixel values as they are.
    info = ModelInfo("lookup", num_classes, 1, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    step = jax.jit(make_eval_step(_Lookup(info)), out_shardings=replicated(mesh))
    weights = {prefix: tuple(map(jnp.asarray, tables)) for prefix, tables in weights.items()}
    return evaluate(step, weights, batches, batch_sharding(mesh), check)


def test_it_may_be_left_after_every_batch(monkeypatch):
    """Once the sums of the batch before are read: so no process is more than one batch ahead."""
    seen, add = [], evaluation._add
    monkeypatch.setattr(evaluation, "_add", lambda *args: (seen.append("read"), add(*args)))

    def batches():
        for _ in range(3):
            seen.append("batch")
            yield _batch([0], [0])

    def check():
        seen.append("check")
        if seen.count("check") == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        _run({"": (_one_hot_table([0], 6),)}, batches(), 6, check)
    assert seen == ["batch", "check", "batch", "read", "check", "batch", "read", "check"]


def _one_hot_table(winners, num_classes, height=10.0):
    """Logits where row i ranks classes winners[i], winners[i]+1, ... downwards."""
    ranks = (np.arange(num_classes)[None] - np.array(winners)[:, None]) % num_classes
    return np.float32(height) - ranks.astype(np.float32)


def test_ema_weights_are_reported_under_their_prefix():
    raw, averaged = _one_hot_table([1, 1], 6), _one_hot_table([0, 1], 6)
    results = _run({"": (raw, raw), "ema_": (averaged, averaged)}, [_batch([0, 1], [0, 1])], 6)
    names = {"top1", "top5", "loss", "top1_cls", "top1_dist"}
    assert set(results) == names | {f"ema_{name}" for name in names} | {"num_examples"}
    assert (results["top1"], results["ema_top1"]) == (50.0, 100.0)
    assert (results["top1_dist"], results["ema_top1_dist"]) == (50.0, 100.0)
    assert (results["top5"], results["ema_top5"]) == (50.0, 100.0)
    assert results["ema_loss"] < results["loss"] < 10  # a mean, not a percentage


def test_padded_rows_never_count_even_where_their_logits_are_not_numbers():
    table = _one_hot_table([0, 1, 2, 0], 6)
    table[3] = np.nan
    plain = _run({"": (table,)}, [_batch([0, 1], [0, 1]), _batch([2], [3])], 6)
    padded = _run(
        {"": (table,)},
        [_batch([0, 1, 3], [0, 1, 0], [1, 1, 0]), _batch([2, 3, 3], [3, 0, 0], [1, 0, 0])],
        6,
    )
    assert plain == padded
    assert padded["num_examples"] == 3
    assert padded["top1"] == pytest.approx(200 / 3)


def test_fewer_than_five_classes():
    table = _one_hot_table([0, 0, 0], 3)
    results = _run({"": (table,)}, [_batch([0, 1, 2], [0, 1, 2])], 3)
    loss = np.mean([0, 1, 2]) + np.log(np.exp(-np.arange(3.0)).sum())
    expected = {"top1": 100 / 3, "top5": 100.0, "loss": loss, "num_examples": 3}
    assert results == pytest.approx(expected, rel=1e-6)


def test_random_logits_follow_numpy_and_repeats_are_equal_to_the_bit():
    rng = np.random.default_rng(0)
    tables = [rng.normal(size=(200, 11)).astype(np.float32) * 3 for _ in range(2)]
    labels = rng.integers(0, 11, 200)
    batches = []
    for start in range(0, 208, 16):
        rows = np.arange(start, start + 16)
        real = rows < 200
        rows = np.where(real, rows, 0)
        batches.append(_batch(rows, labels[rows], real))
    first = _run({"": tuple(tables)}, batches, 11)
    assert first == _run({"": tuple(tables)}, batches, 11)

    logits = (tables[0].astype(np.float64) + tables[1]) / 2
    ranks = np.argsort(-logits, axis=1)
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(200), labels]
    assert first == pytest.approx(
        {
            "num_examples": 200,
            "top1": 100 * np.mean(ranks[:, 0] == labels),
            "top5": 100 * np.mean((ranks[:, :5] == labels[:, None]).any(1)),
            "loss": losses.mean(),
            "top1_cls": 100 * np.mean(tables[0].argmax(1) == labels),
            "top1_dist": 100 * np.mean(tables[1].argmax(1) == labels),
        },
        rel=1e-6,
    )
