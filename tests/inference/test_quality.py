"""Accuracy, confusion and calibration against scikit-learn and against loops in float64."""

import math

import numpy as np
import pytest
from sklearn import metrics

from deit_jax.inference import quality

CLASSES = 7


@pytest.fixture(scope="module")
def case():
    """Logits of many confidences, some equal and some far apart, and labels that often agree."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (500, CLASSES)) * rng.uniform(0, 9, (500, 1))
    logits[:5] = 0  # all equal: the first class wins
    logits[5:8, 3] = 1e4  # no other class has any probability
    label = np.where(rng.random(500) < 0.6, logits.argmax(1), rng.integers(0, CLASSES, 500))
    return logits.astype(np.float32), label


def test_totals(case):
    logits, label = case
    parts = [
        quality.Outcomes.of(logits[at], label[at]) for at in np.split(np.arange(500), [9, 200])
    ]
    found = quality.totals(quality.Outcomes.joined(parts))
    likely = np.exp(np.float64(logits) - np.max(logits, 1, keepdims=True))
    likely = np.maximum(likely / likely.sum(1, keepdims=True), np.finfo(float).tiny)
    every = range(CLASSES)
    assert found["num_examples"] == 500
    assert found["top1"] == pytest.approx(100 * metrics.accuracy_score(label, logits.argmax(1)))
    five = metrics.top_k_accuracy_score(label[8:], logits[8:], k=5, labels=every, normalize=False)
    ties = sum(label[:5] < 5) + sum(quality.Outcomes.of(logits[5:8], label[5:8]).in_top5)
    assert found["top5"] == pytest.approx(100 * (five + ties) / 500)
    loss = sum(-math.log(likely[i, label[i]]) for i in range(500)) / 500
    assert found["loss"] == pytest.approx(loss, rel=1e-12)


def test_confusion(case):
    logits, label = case
    dense = np.zeros((CLASSES, CLASSES), int)
    for of, predicted, count in quality.confusion(quality.Outcomes.of(logits, label)):
        dense[of, predicted] = count
    np.testing.assert_array_equal(dense, metrics.confusion_matrix(label, logits.argmax(1)))


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration(case, bins):
    logits, label = case
    found = quality.calibration(quality.Outcomes.of(logits, label), bins)
    exact = np.float64(logits)
    members = [[] for _ in range(bins)]
    for row, right in zip(exact, label, strict=True):
        likely = [math.exp(x - max(row)) for x in row]
        sure = max(likely) / sum(likely)
        number = next(b for b in range(bins) if sure <= (b + 1) / bins or b == bins - 1)
        members[number].append((sure, int(np.argmax(row)) == right))
    error = 0.0
    for one, own in zip(found["bins"], members, strict=True):
        assert one["num_examples"] == len(own)
        if own:
            sure, right = (sum(x) / len(own) for x in zip(*own, strict=True))
            assert one["confidence"] == pytest.approx(sure)
            assert one["accuracy"] == pytest.approx(right)
            error += len(own) / 500 * abs(sure - right)
        else:
            assert one["accuracy"] is one["confidence"] is None
    assert found["ece"] == pytest.approx(100 * error)
