"""Exact evaluation of a whole split: every example counts once on any number of devices."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from deit_jax import trees
from deit_jax.models.network import Network, Variables, join_model
from deit_jax.models.registry import ModelInfo
from deit_jax.parallel import devices
from deit_jax.parallel.mesh import batch_sharding, replicated, sum_over_processes, to_global
from deit_jax.parallel.preemption import StopSignal
from deit_jax.training import losses, mixing
from deit_jax.training.run import Run
from deit_jax.training.state import TrainState

if TYPE_CHECKING:  # the step runs without ml_collections, which GPU hosts may lack
    from ml_collections import ConfigDict

_PERCENT = ("top1", "top5", "top1_cls", "top1_dist")
_REPORTED = (*_PERCENT, "loss")


def evaluate(
    eval_step: Callable[[dict[str, Variables], dict], dict],
    weights: dict[str, Variables],
    batches: Iterable[dict[str, np.ndarray]],
    sharding: NamedSharding,
    check: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Runs the jitted `eval_step` (`make_eval_step`) over one pass of a split.

    Args:
      eval_step: jitted, with replicated outputs.
      weights: prefix → variables, as `eval_step` takes them.
      batches: this process's rows of every global batch, padded rows masked.
      sharding: of the batch on the mesh.
      check: called after every batch; may raise, to leave.

    Returns:
      For every prefix the accuracies in percent and the mean loss; `num_examples` counts the
      unmasked rows. Sums are added in float64 in batch order, so repeats agree to the bit.
    """
    totals: dict[str, float] = {}
    pending = None
    for batch in batches:
        sums = eval_step(weights, to_global(batch, sharding))
        if pending is not None:  # one step in flight while the host prepares the next batch
            _add(totals, pending)
        pending = sums
        check()
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


def evaluator(run: Run, stop: StopSignal) -> Callable[[TrainState], dict[str, float]]:
    """Returns a function from a state to its results on the run's eval split, compiled once."""
    evaluate_weights = split_evaluator(run, run.network, run.config.input.image_size, stop)
    return lambda state: evaluate_weights(
        {"": state.model} | ({} if state.ema is None else {"ema_": state.ema})
    )


def skipped(batches: Iterator[dict], config: "ConfigDict") -> dict[str, int]:
    """Returns the number of unreadable images so far, {} without any; every process must call it.

    One that several processes have met, in different epochs, counts for each of them.
    """
    if config.input.on_bad_image != "skip":  # never any: the first is an error
        return {}
    count = sum_over_processes(len(batches.skipped))
    return {"skipped_images": count} if count else {}


def images_digest(run: Run, info: ModelInfo, image_size: int) -> str:
    """Returns a digest of what an evaluation shows a model: the split, and how it is prepared."""
    chosen = run.config.input
    names = ("crop_ratio", "interpolation", "on_bad_image")
    facts = {name: chosen[name] for name in names} | {"whole": chosen.train_crop == "small"}
    facts |= {"size": image_size, "mean": info.mean, "std": info.std}
    facts |= {"dtype": run.config.train.dtype, "split": run.eval_source.fingerprint()}
    return trees.digest(json.dumps(facts, sort_keys=True))


def split_evaluator(
    run: Run, network: Network, image_size: int, stop: StopSignal
) -> Callable[[dict[str, Variables]], dict[str, float]]:
    """Builds a function from weights by prefix to their results on the run's eval split.

    It raises Preempted between two batches where the run is to stop.
    """
    from deit_jax import data

    eval_step = devices.of(run.mesh)(make_eval_step(network))
    eval_step = jax.jit(eval_step, out_shardings=replicated(run.mesh))
    plan = dataclasses.replace(run.input_plan(), image_size=image_size)

    def evaluate_weights(weights: dict[str, Variables]) -> dict[str, float]:
        batches = data.eval_batches(run.eval_source, plan)
        results = evaluate(eval_step, weights, batches, batch_sharding(run.mesh), stop.check)
        return results | skipped(batches, run.config)

    return evaluate_weights


def make_eval_step(network: Network) -> Callable[[dict[str, Variables], dict], dict]:
    """Builds the pure evaluation step.

    Returns:
      step(weights, batch) → sums. `weights` maps a prefix ("", "ema_", ...) to variables; `batch`
      holds uint8 images [B,H,W,3], int32 labels [B] and a mask [B] that is 0 on padding rows. Sums
      are float32 scalars over the unmasked rows: `num_examples`, and per prefix `top1`, `top5`
      (top-K for fewer than 5 classes), `loss` (plain cross-entropy), and for distilled models
      `top1_cls` and `top1_dist`, each head alone.
    """
    mean, std = network.info.mean, network.info.std

    def eval_step(weights: dict[str, Variables], batch: dict) -> dict:
        images = mixing.normalize(batch["image"], mean, std)
        labels, mask = batch["label"], batch["mask"].astype(jnp.float32)
        sums = {"num_examples": mask.sum()}
        for prefix, variables in weights.items():
            heads, _ = network(variables, images)
            logits = sum(heads) / len(heads)
            _, ranked = jax.lax.top_k(logits, min(5, logits.shape[-1]))
            hits = ranked == labels[:, None]
            per_image = {
                "top1": hits[:, 0],
                "top5": hits.any(-1),
                "loss": losses.cross_entropy(logits, labels),
            }
            if len(heads) == 2:
                per_image["top1_cls"] = heads[0].argmax(-1) == labels
                per_image["top1_dist"] = heads[1].argmax(-1) == labels
            for name, values in per_image.items():
                values = values.astype(jnp.float32)
                sums[prefix + name] = jnp.where(mask > 0, values, 0.0).sum()
        return sums

    return eval_step


def make_attention_probe(network: Network) -> Callable[[Variables, jax.Array], jax.Array]:
    """Builds probe(variables, images) → the largest attention logit by magnitude, float32 [].

    Of all blocks, heads and uint8 `images` [B,H,W,3]: a sign of divergence before the loss shows
    it. One more forward pass, without augmentation and noise.
    """

    def probe(variables: Variables, images: jax.Array) -> jax.Array:
        images = mixing.normalize(images, network.info.mean, network.info.std)
        return join_model(network, variables).attention_maxima(images).max()

    return probe
