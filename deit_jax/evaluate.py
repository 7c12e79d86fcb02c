"""Exact evaluation of a whole split: every example counts once on any number of devices."""

from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from deit_jax import parallel, steps
from deit_jax.models import registry
from deit_jax.startup import Setup
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


def evaluator(setup: Setup) -> Callable[[steps.TrainState], dict[str, float]]:
    """A function from a state to its results on the run's eval split, compiled once."""
    run = _pass(setup, setup.network, setup.config.input.image_size)
    return lambda state: run({"": state.model} | ({} if state.ema is None else {"ema_": state.ema}))


def teacher_accuracy(
    setup: Setup, teacher: steps.Network | None, variables: Variables | None
) -> dict[str, float]:
    """The teacher's `teacher_top1` on the eval split, at the resolution that it sees in training.

    Nothing without a teacher. One that knows only its own resolution gets whole images of that,
    not the student's images resized.
    """
    if teacher is None:
        return {}
    size = registry.fixed_size(teacher.info) or setup.config.input.image_size
    return {"teacher_top1": _pass(setup, teacher, size)({"": variables})["top1"]}


def skipped(batches: Iterator[dict], config: ConfigDict) -> dict[str, int]:
    """How many images could not be read so far, if any; else nothing. Every process asks.

    One that several processes have met, in different epochs, counts for each of them.
    """
    if config.input.on_bad_image != "skip":  # never any: the first is an error
        return {}
    count = parallel.total(len(batches.skipped))
    return {"skipped_images": count} if count else {}


def _pass(
    setup: Setup, network: steps.Network, image_size: int
) -> Callable[[dict[str, Variables]], dict[str, float]]:
    from deit_jax import data

    eval_step = jax.jit(
        steps.make_eval_step(network), out_shardings=parallel.replicated(setup.mesh)
    )

    def run(weights: dict[str, Variables]) -> dict[str, float]:
        batches = data.eval_batches(
            setup.eval_source,
            setup.config.input,
            image_size=image_size,
            batch_size=setup.config.train.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        results = evaluate(eval_step, weights, batches, parallel.batch_sharding(setup.mesh))
        return results | skipped(batches, setup.config)

    return run
