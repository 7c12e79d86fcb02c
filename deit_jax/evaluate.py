"""Exact evaluation of a whole split: every example counts once on any number of devices."""

from collections.abc import Callable, Iterable

import jax
import numpy as np
from jax.sharding import NamedSharding

from deit_jax import parallel
from deit_jax.steps import Variables

_PERCENT = ("top1", "top5", "top1_cls", "top1_dist")
_REPORTED = (*_PERCENT, "loss")


def evaluate(
    eval_step: Callable[[dict[str, Variables], dict], dict],
    weights: dict[str, Variables],
    batches: Iterable[dict[str, np.ndarray]],
    sharding: NamedSharding,
) -> dict[str, float]:
    """Runs the jitted `eval_step` (`steps.make_eval_step`) over one pass of a split.

    Args:
      eval_step: jitted, with replicated outputs.
      weights: prefix → variables, as `eval_step` takes them.
      batches: this process's rows of every global batch, padded rows masked.
      sharding: of the batch on the mesh.

    Returns:
      For every prefix the accuracies in percent and the mean loss; `num_examples` counts the
      unmasked rows. Sums are added in float64 in batch order, so repeats agree to the bit.
    """
    totals: dict[str, float] = {}
    pending = None
    for batch in batches:
        sums = eval_step(weights, parallel.to_global(batch, sharding))
        if pending is not None:  # one step in flight while the host prepares the next batch
            _add(totals, pending)
        pending = sums
    if pending is not None:
        _add(totals, pending)
    count = totals["num_examples"]
    result = {
        prefix + name: totals[prefix + name] / count * (100.0 if name in _PERCENT else 1.0)
        for prefix in weights
        for name in _REPORTED
        if prefix + name in totals
    }
    return result | {"num_examples": int(count)}


def _add(totals: dict[str, float], sums: dict[str, jax.Array]) -> None:
    for name, value in jax.device_get(sums).items():
        totals[name] = totals.get(name, 0.0) + float(value)
