"""Draws what a run sees and what it takes it for, for TensorBoard, wandb and `show-batch`."""

import dataclasses
import json
import math
from typing import TYPE_CHECKING

import jax
import numpy as np

from deit_jax.drawing import draw
from deit_jax.models import imagenet
from deit_jax.parallel import devices
from deit_jax.training import mixing
from deit_jax.training.metrics import MetricWriter
from deit_jax.training.run import Run
from deit_jax.training.state import TrainState, step_keys
from deit_jax.training.step import make_augment

if TYPE_CHECKING:  # the step runs without ml_collections, which GPU hosts may lack
    from ml_collections import ConfigDict

    from deit_jax.config.plan import RunPlan

IMAGES = 24


class Showcase:
    """Shows a run's config, its first batch, and the same evaluation images at each evaluation.

    Pictures are drawn where one process has the whole batch and the whole model.
    """

    def __init__(self, run: Run, writer: MetricWriter):
        """Draws nothing yet; nothing ever where the writer has no use for it."""
        self._run, self._writer = run, writer
        self._draws = writer.draws and jax.process_count() == 1
        self._images: dict | None = None  # of evaluation

    def config(self, step: int) -> None:
        """Shows the config with which the run begins, or goes on."""
        if self._writer.draws:
            text = json.dumps(self._run.config.to_dict(), indent=2, default=str)
            self._writer.text(step, "config", text)

    def batch(self, step: int, batch: dict) -> None:
        """Shows the batch of a step as the model sees it."""
        if self._draws:
            run = self._run
            self._show(step, "train/batch", *augmented(run.config, run.plan, batch, step, IMAGES))

    def evaluation(self, step: int, state: TrainState) -> None:
        """Shows some evaluation images, each with the name that the model gives it."""
        if not self._draws:
            return
        from deit_jax import data

        run, info = self._run, self._run.network.info
        if self._images is None:
            count = min(IMAGES, run.eval_source.num_examples)
            plan = dataclasses.replace(run.input_plan(), batch_size=count, group_size=1)
            self._images = next(data.eval_batches(run.eval_source, plan))

            def forward(variables: object, images: jax.Array) -> tuple[jax.Array, ...]:
                return run.network(variables, mixing.normalize(images, info.mean, info.std))[0]

            self._forward = jax.jit(devices.of(run.mesh)(forward))
        heads = self._forward(state.model, self._images["image"])
        found = sum(np.asarray(head) for head in heads).argmax(-1)
        names, rows = names_of(run.plan), np.flatnonzero(self._images["mask"])
        labels = self._images["label"]
        captions = [
            names[labels[row]] + ("" if found[row] == labels[row] else f"\nNOT {names[found[row]]}")
            for row in rows
        ]
        self._show(step, "eval/images", list(self._images["image"][rows]), captions)

    def _show(self, step: int, name: str, tiles: list[np.ndarray], captions: list[str]) -> None:
        columns = math.ceil(math.sqrt(1.5 * len(tiles)))
        sheet = draw(tiles, captions, title=f"step {step}", columns=columns)
        self._writer.picture(step, name, sheet)


def names_of(plan: "RunPlan") -> list[str]:
    """Returns the readable names of a run's classes."""
    names = [imagenet.readable(name) for name in plan.class_names]
    return names or [f"class {number}" for number in range(plan.num_classes)]


def augmented(
    config: "ConfigDict", plan: "RunPlan", batch: dict, step: int, count: int
) -> tuple[list[np.ndarray], list[str]]:
    """Returns the first rows of a batch as a training step sees them, and what it is told of them.

    Args:
      config: of the run.
      plan: its derived numbers.
      batch: the global batch of the step.
      step: its number, from which the random numbers follow.
      count: rows; all where the batch has fewer.

    Returns:
      Images uint8 [S,S,3], no longer normalised; and their captions.
    """
    key, _ = step_keys(config.train.seed, step)
    images, targets, mix = jax.jit(make_augment(config, plan))(key, batch)
    mean, std = np.float64(config.input.mean), np.float64(config.input.std)
    pixels = np.rint(255 * (np.asarray(images[:count]) * std + mean))
    smoothing, classes = config.mixing.smoothing, plan.num_classes
    with np.errstate(invalid="ignore"):  # smoothing 1 leaves no class anything of its own
        weights = (np.asarray(targets[:count]) - smoothing / classes) / np.float64(1 - smoothing)
    names, captions = names_of(plan), []
    for row, (own, shares) in enumerate(zip(batch["label"], weights.round(6), strict=False)):
        # Rounded twice: float32's error must not tip 0.625 and 0.375 to a sum of 1.01.
        others = [k for k in np.flatnonzero(shares > 0.005) if k != own]
        target = " · ".join(f"{names[k]} {shares[k]:.2f}" for k in (own, *others))
        group = row // plan.group_size
        kind = "cutmix" if mix.use_cutmix[group] else "mixup"
        mixed = f"{kind} {mix.lam[group]:.2f}" if mix.lam[group] < 1 else "not mixed"
        captions.append(f"{target}\ngroup {group} · {mixed}")
    return list(pixels.clip(0, 255).astype(np.uint8)), captions  # erasing's noise is cut
