"""Figures of how good predictions are, in NumPy: accuracy, confusion and calibration."""

import dataclasses
from typing import Any

import numpy as np

BINS = 15  # of equal width, as in arXiv 1706.04599


@dataclasses.dataclass
class Outcomes:
    """What became of N examples.

    Attributes:
      label: int [N].
      predicted: int [N], the likeliest class.
      confidence: float64 [N], its probability.
      of_label: float64 [N], the probability of the label.
      in_top5: bool [N].
    """

    label: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    of_label: np.ndarray
    in_top5: np.ndarray

    @classmethod
    def of(cls, logits: np.ndarray, label: np.ndarray) -> "Outcomes":
        """Returns the outcomes of logits [N, K]; of equal logits the first class wins."""
        exact = np.float64(logits)
        exponents = np.exp(exact - exact.max(-1, keepdims=True))
        probabilities = exponents / exponents.sum(-1, keepdims=True)
        ranked = np.argsort(-exact, axis=-1, kind="stable")
        rows = np.arange(len(label))
        return cls(
            label,
            ranked[:, 0],
            probabilities[rows, ranked[:, 0]],
            probabilities[rows, label],
            (ranked[:, :5] == label[:, None]).any(-1),
        )

    @property
    def correct(self) -> np.ndarray:
        """Returns whether the likeliest class is the label, bool [N]."""
        return self.label == self.predicted

    @staticmethod
    def joined(parts: list["Outcomes"]) -> "Outcomes":
        """Returns the outcomes of all parts."""
        names = [field.name for field in dataclasses.fields(Outcomes)]
        return Outcomes(*(np.concatenate([getattr(part, n) for part in parts]) for n in names))


def totals(outcomes: Outcomes) -> dict[str, float]:
    """Returns top1 and top5 in percent, the mean cross-entropy, and the number of examples."""
    tiny = np.finfo(np.float64).tiny
    return {
        "top1": 100 * float(outcomes.correct.mean()),
        "top5": 100 * float(outcomes.in_top5.mean()),
        "loss": float(-np.log(np.maximum(outcomes.of_label, tiny)).mean()),
        "num_examples": len(outcomes.label),
    }


def confusion(outcomes: Outcomes) -> list[tuple[int, int, int]]:
    """Returns (label, predicted, examples) of every pair that occurs, ordered by both."""
    pairs = np.stack([outcomes.label, outcomes.predicted], axis=1)
    found, counts = np.unique(pairs, axis=0, return_counts=True)
    return [(*map(int, pair), int(n)) for pair, n in zip(found, counts, strict=True)]


def calibration(outcomes: Outcomes, bins: int = BINS) -> dict[str, Any]:
    """Returns how far confidence is from accuracy.

    Args:
      outcomes: of the examples.
      bins: of equal width, each without its lower and with its upper end.

    Returns:
      `ece`, the expected calibration error in percent: the mean over all examples of the distance
      between accuracy and mean confidence in their bin; and `bins`: `from`, `to`, `num_examples`,
      and `accuracy` and `confidence` from 0 to 1, None where a bin is empty.
    """
    place = np.clip(np.ceil(outcomes.confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    some = np.maximum(counts, 1)
    accuracy = np.bincount(place, outcomes.correct, minlength=bins) / some
    confidence = np.bincount(place, outcomes.confidence, minlength=bins) / some
    rows = [
        {
            "from": number / bins,
            "to": (number + 1) / bins,
            "num_examples": int(counts[number]),
            "accuracy": float(accuracy[number]) if counts[number] else None,
            "confidence": float(confidence[number]) if counts[number] else None,
        }
        for number in range(bins)
    ]
    ece = (counts * np.abs(accuracy - confidence)).sum() / counts.sum()
    return {"ece": 100 * float(ece), "bins": rows}
