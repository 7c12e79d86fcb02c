"""Derives the numbers of a run from its config, its data and its devices."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from deit_jax.config.validate import refuse
from deit_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """The derived numbers of a run."""

    num_classes: int
    class_names: tuple[str, ...]
    num_train: int  # examples in the train split
    num_eval: int
    steps_per_epoch: int
    total_steps: int
    warmup_epochs: int  # those of the config, but at most half of its epochs
    warmup_steps: int
    group_size: int  # images that share one mixup/cutmix draw, at most a device's
    order_group_size: int  # the same for the order of the stream, which no device count may change
    images_per_epoch: int
    distinct_images_per_epoch: int
    eval_every: int  # steps; the last step always evaluates
    save_every: tuple[int, ...]  # steps; the last step always saves
    warnings: tuple[str, ...]  # a line each, for whoever starts the run


def check_batch(
    config: ConfigDict, *, num_devices: int, num_processes: int, training: bool = True
) -> None:
    """Raises InputError unless the batch and the mesh divide evenly over the devices."""
    if num_devices % config.parallel.fsdp:
        refuse(config, "parallel.fsdp", f"a divisor of the number of devices ({num_devices})")
    batch = config.train.batch_size
    if batch % num_devices:
        lower = batch // num_devices * num_devices
        nearest = f"{lower} or {lower + num_devices}" if lower else str(num_devices)
        devices = f"{num_devices} devices of the mesh ({num_processes} processes)"
        refuse(config, "train.batch_size", f"a multiple of the {devices}: try {nearest}")
    images = batch // num_devices
    if training and images % config.train.accumulate_steps:
        share = f"{images} images of a device (train.batch_size {batch} over {num_devices} devices)"
        refuse(config, "train.accumulate_steps", f"a divisor of the {share}")


def plan_data(
    config: ConfigDict, train_source: Any, *, num_devices: int, num_eval: int = 0
) -> RunPlan:
    """Returns `plan_run` for an opened train split, a `deit_jax.data.Source`."""
    return plan_run(
        config,
        num_train=train_source.num_examples,
        num_classes=train_source.num_classes,
        num_devices=num_devices,
        num_eval=num_eval,
        class_names=train_source.class_names,
    )


def plan_run(
    config: ConfigDict,
    *,
    num_train: int,
    num_classes: int,
    num_devices: int,
    num_eval: int = 0,
    class_names: tuple[str, ...] = (),
) -> RunPlan:
    """Returns the run's numbers.

    An epoch of repeated augmentation follows the reference's sampler (RASampler): as many samples
    as the split has, rounded down to a multiple of 256, each image `repeats` times.

    Args:
      config: checked by `validate` and `check_batch`.
      num_train: examples in the train split.
      num_classes: of the data.
      num_devices: of all processes.
      num_eval: examples in the eval split.
      class_names: in the order of the labels; () where there are none.

    Raises:
      InputError: the train split is smaller than a batch, or the images of a device do not pair up
        for mixing.
    """
    batch, repeats = config.train.batch_size, config.input.repeats
    samples = num_train // 256 * 256 if repeats > 1 and num_train >= 256 else num_train
    steps_per_epoch = samples // batch
    if steps_per_epoch == 0:
        raise InputError(
            f"config.train.batch_size is {batch}, but the train split has only {num_train} images; "
            "choose a batch no larger than the split"
        )
    group_size = _group_size(config.mixing.group_size, batch // num_devices)
    if _mixes(config.mixing) and group_size % 2:
        raise InputError(
            f"config.mixing.group_size is {config.mixing.group_size}, which leaves groups of "
            f"{group_size} in the {batch // num_devices} images of a device, but mixup and cutmix "
            "pair images; choose an even group and a batch with an even number of images a device"
        )
    images = steps_per_epoch * batch
    epochs, checkpoint = config.schedule.epochs, config.checkpoint
    warmup_epochs = min(config.schedule.warmup_epochs, epochs // 2)
    return RunPlan(
        num_classes=num_classes,
        class_names=class_names,
        num_train=num_train,
        num_eval=num_eval,
        steps_per_epoch=steps_per_epoch,
        total_steps=steps_per_epoch * epochs,
        warmup_epochs=warmup_epochs,
        warmup_steps=steps_per_epoch * warmup_epochs,
        group_size=group_size,
        order_group_size=_group_size(config.mixing.group_size, batch),
        images_per_epoch=images,
        distinct_images_per_epoch=-(-images // repeats),
        eval_every=steps_per_epoch * config.train.eval_every_epochs,
        save_every=(steps_per_epoch * checkpoint.every_epochs, checkpoint.every_steps),
        warnings=tuple(_warnings(config, warmup_epochs, steps_per_epoch * epochs, group_size)),
    )


def plan_evaluation(eval_source: Any) -> RunPlan:
    """Returns the numbers of an evaluation alone, which needs no train split: it has no steps."""
    return RunPlan(
        num_classes=eval_source.num_classes,
        class_names=eval_source.class_names,
        num_train=0,
        num_eval=eval_source.num_examples,
        steps_per_epoch=0,
        total_steps=0,
        warmup_epochs=0,
        warmup_steps=0,
        group_size=1,
        order_group_size=1,
        images_per_epoch=0,
        distinct_images_per_epoch=0,
        eval_every=0,
        save_every=(),
        warnings=(),
    )


def _mixes(mixing: ConfigDict) -> bool:
    """Tells whether images are mixed with one another."""
    return bool(mixing.prob and (mixing.mixup_alpha or mixing.cutmix_alpha))


def _warnings(
    config: ConfigDict, warmup_epochs: int, total_steps: int, group_size: int
) -> Iterator[str]:
    """Yields a line for each field that does not suit so short a run, or so small a batch."""
    schedule, decay = config.schedule, config.train.ema_decay
    if _mixes(config.mixing) and group_size < config.mixing.group_size / 2:
        yield (
            f"{group_size} images share a draw of mixup or cutmix, less than half of "
            f"config.mixing.group_size {config.mixing.group_size}: a device's images must hold "
            "whole groups"
        )
    if warmup_epochs < schedule.warmup_epochs:
        yield (
            f"warm-up takes {warmup_epochs} of {schedule.epochs} epochs, at most half, instead of "
            f"config.schedule.warmup_epochs {schedule.warmup_epochs}"
        )
    if schedule.per_epoch and 0 < warmup_epochs == schedule.epochs - 1:
        yield (
            f"with config.schedule.per_epoch the rate lags by an epoch: it stays at warmup_lr "
            f"{schedule.warmup_lr:g} in all {schedule.epochs} epochs; set "
            "--config.schedule.per_epoch=False, or more epochs"
        )
    if decay > 0 and total_steps * (1 - decay) < 1:
        better = 1 - float(f"{10 / max(total_steps, 20):.1g}")  # over a tenth of the run
        yield (
            f"EMA with config.train.ema_decay {decay:g} averages over {1 / (1 - decay):,.0f} steps,"
            f" but the run has {total_steps:,}: the EMA stays near its start; set "
            f"--config.train.ema_decay={better:g}, or 0 for no EMA"
        )


def _group_size(wanted: int, images: int) -> int:
    """Returns the largest divisor of `images` up to `wanted`; an even one if there is any.

    Groups never span devices, and mixing pairs the images of a group.
    """
    sizes = [size for size in range(1, min(wanted, images) + 1) if images % size == 0]
    return max(sizes, key=lambda size: (size % 2 == 0, size))
