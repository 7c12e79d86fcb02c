"""Validation of a parsed config, and every number that follows from it."""

import dataclasses
import importlib.util
import inspect
import itertools
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from deit_jax.errors import InputError
from deit_jax.fields import check_structure
from deit_jax.policy import parse_policy

_CHOICES = {
    "dataset.source": ("tfds", "folder", "digits"),
    "input.train_crop": ("random_resized", "simple_random", "small"),
    "input.on_bad_image": ("error", "skip"),
    "input.interpolation": ("bicubic", "bilinear"),
    "distill.kind": ("none", "hard", "soft"),
    "distill.reduction": ("numel", "batchmean"),
    "optimizer.name": ("adamw", "lamb", "sgd"),
    "train.loss": ("cross_entropy", "bce"),
    "train.dtype": ("bfloat16", "float32"),
    "parallel.backend": ("mesh", "pmap"),
}
_AT_LEAST_ONE = (
    "input.image_size", "input.repeats", "mixing.group_size", "schedule.epochs",
    "train.batch_size", "train.accumulate_steps", "train.log_every_steps",
    "train.max_nonfinite_steps", "parallel.fsdp", "checkpoint.keep", "distributed.num_processes",
    "distributed.start_timeout",
)  # fmt: skip
_PROBABILITIES = (
    "model.drop_path_rate", "input.hflip", "mixing.random_erasing", "mixing.prob",
    "mixing.switch_prob", "mixing.smoothing", "distill.alpha", "train.ema_decay",
)  # fmt: skip
_NOT_NEGATIVE = (
    "model.patch_size", "dataset.num_classes", "input.pad", "input.color_jitter",
    "mixing.mixup_alpha", "mixing.cutmix_alpha", "distill.teacher_epochs", "optimizer.lr",
    "optimizer.weight_decay", "optimizer.clip_norm",
    "schedule.warmup_epochs", "schedule.warmup_lr", "schedule.min_lr", "train.seed",
    "train.eval_every_epochs", "checkpoint.every_epochs", "checkpoint.every_steps",
    "distributed.process_id",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """The numbers a run follows, derived from its config, its data and its devices."""

    num_classes: int
    class_names: tuple[str, ...]
    num_train: int  # examples in the train split
    num_eval: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    group_size: int  # images that share one mixup/cutmix draw, at most a device's
    order_group_size: int  # the same for the order of the stream, which no device count may change
    images_per_epoch: int
    distinct_images_per_epoch: int
    eval_every: int  # steps; the last step always evaluates
    save_every: tuple[int, ...]  # steps; the last step always saves


def validate(config: ConfigDict) -> None:
    """Checks names, types, ranges and combinations that need no data and no device.

    Raises:
      InputError: the first field that is wrong, what it holds and what it may hold.
    """
    check_structure(config)
    for name, choices in _CHOICES.items():
        if _get(config, name) not in choices:
            _refuse(config, name, f"one of {', '.join(choices)}")
    _check_range(config, _AT_LEAST_ONE, lambda value: value >= 1, "at least 1")
    _check_range(config, _PROBABILITIES, lambda value: 0 <= value <= 1, "between 0 and 1")
    _check_range(config, _NOT_NEGATIVE, lambda value: value >= 0, "0 or more")
    _check_range(
        config,
        ("distill.temperature", "optimizer.eps"),
        lambda value: value > 0,
        "greater than 0",
    )
    _check_range(config, ("input.crop_ratio",), lambda value: 0 < value <= 1, "in (0, 1]")
    _check_range(config, ("dataset.train_fraction",), lambda value: 0 < value <= 1, "in (0, 1]")
    _check_range(
        config,
        ("optimizer.b1", "optimizer.b2", "optimizer.momentum"),
        lambda value: 0 <= value < 1,
        "in [0, 1)",
    )
    _check_range(config, ("input.std",), lambda value: min(value) > 0, "numbers greater than 0")
    for pattern in config.optimizer.trainable.split():
        try:
            re.compile(pattern)
        except re.error as error:
            _refuse(config, "optimizer.trainable", f"regular expressions ({pattern!r}: {error})")
    for name in ("input.scale", "input.ratio"):
        low, high = _get(config, name)
        if not 0 < low <= high:
            _refuse(config, name, "two numbers, 0 < low <= high")
    if config.input.auto_augment:
        try:
            parse_policy(config.input.auto_augment)
        except InputError as error:
            raise InputError(f"config.input.auto_augment: {error}") from None
        if config.input.three_augment:
            raise InputError(
                f"config.input.three_augment is True, but config.input.auto_augment is "
                f"{config.input.auto_augment!r}: the one takes the place of the other; set "
                "auto_augment to '' or three_augment to False"
            )
    if config.distill.kind == "none" and (config.distill.teacher or config.distill.teacher_config):
        raise InputError(
            "config.distill.teacher or teacher_config is set, but config.distill.kind is 'none'; "
            "set --config.distill.kind=hard (or soft), or remove the teacher"
        )
    if config.train.loss == "bce" and config.mixing.smoothing:
        _refuse(
            config,
            "mixing.smoothing",
            "0 where train.loss is 'bce', which counts every smoothed target as a true class",
        )
    if config.train.cosub and not config.model.drop_path_rate:
        _refuse(config, "train.cosub", "False where model.drop_path_rate is 0: no two submodels")
    if config.train.cosub and config.distill.kind != "none":
        _refuse(config, "train.cosub", "False where distill.kind is not 'none': it has no teacher")
    if config.parallel.backend == "pmap" and config.parallel.fsdp > 1:
        _refuse(config, "parallel.fsdp", "1 where parallel.backend is 'pmap', which shards nothing")
    if config.schedule.warmup_epochs >= config.schedule.epochs:
        _refuse(
            config,
            "schedule.warmup_epochs",
            f"less than schedule.epochs ({config.schedule.epochs})",
        )
    if not _is_curve(config.train.expected_top1):
        _refuse(config, "train.expected_top1", "pairs (epoch, top-1 in percent), epochs rising")
    _check_distributed(config)


def _is_curve(pairs: tuple) -> bool:
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and type(pair[0]) is int):
            return False
        if not (isinstance(pair[1], (int, float)) and 0 <= pair[1] <= 100):
            return False
    epochs = [0, *(pair[0] for pair in pairs)]
    return all(before < after for before, after in itertools.pairwise(epochs))


def _check_distributed(config: ConfigDict) -> None:
    distributed = config.distributed
    address, several = distributed.coordinator_address, distributed.num_processes > 1
    if (several or address) and not address.rpartition(":")[2].isdigit():
        _refuse(config, "distributed.coordinator_address", "HOST:PORT of process 0")
    if distributed.process_id >= distributed.num_processes:
        _refuse(config, "distributed.process_id", "less than distributed.num_processes")


def check_batch(config: ConfigDict, *, num_devices: int, num_processes: int) -> None:
    """Raises InputError unless the batch and the mesh divide evenly over the devices."""
    if num_devices % config.parallel.fsdp:
        _refuse(config, "parallel.fsdp", f"a divisor of the number of devices ({num_devices})")
    batch = config.train.batch_size
    if batch % num_devices:
        lower = batch // num_devices * num_devices
        nearest = f"{lower} or {lower + num_devices}" if lower else str(num_devices)
        _refuse(
            config,
            "train.batch_size",
            f"a multiple of the {num_devices} devices of the mesh ({num_processes} processes): "
            f"try {nearest}",
        )
    if batch // num_devices % config.train.accumulate_steps:
        _refuse(
            config,
            "train.accumulate_steps",
            f"a divisor of the {batch // num_devices} images of a device (config.train.batch_size "
            f"{batch} over {num_devices} devices)",
        )


def plan_run(
    config: ConfigDict,
    *,
    num_train: int,
    num_eval: int,
    num_classes: int,
    class_names: tuple[str, ...],
    num_devices: int,
) -> RunPlan:
    """Derives the run's numbers.

    A repeated-augmentation epoch follows the reference's sampler: as many samples as the split has
    (rounded down to a multiple of 256), drawn as `repeats` views of a `repeats`-th of the images.

    Raises:
      InputError: the train split is smaller than one global batch, or a device's images do not
        pair up for mixing.
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
    mixing = config.mixing.prob and (config.mixing.mixup_alpha or config.mixing.cutmix_alpha)
    if mixing and group_size % 2:
        raise InputError(
            f"config.mixing.group_size is {config.mixing.group_size}, which leaves groups of "
            f"{group_size} in the {batch // num_devices} images of a device, but mixup and cutmix "
            "pair images; choose an even group and a batch with an even number of images a device"
        )
    images = steps_per_epoch * batch
    return RunPlan(
        num_classes=num_classes,
        class_names=class_names,
        num_train=num_train,
        num_eval=num_eval,
        steps_per_epoch=steps_per_epoch,
        total_steps=steps_per_epoch * config.schedule.epochs,
        warmup_steps=steps_per_epoch * config.schedule.warmup_epochs,
        group_size=group_size,
        order_group_size=_group_size(config.mixing.group_size, batch),
        images_per_epoch=images,
        distinct_images_per_epoch=-(-images // repeats),
        eval_every=steps_per_epoch * config.train.eval_every_epochs,
        save_every=(
            steps_per_epoch * config.checkpoint.every_epochs,
            config.checkpoint.every_steps,
        ),
    )


def _group_size(wanted: int, images: int) -> int:
    """The largest group of at most `wanted` that divides `images`, an even one if there is any.

    Groups never span devices, and mixing pairs the images of a group.
    """
    sizes = [size for size in range(1, min(wanted, images) + 1) if images % size == 0]
    return max(sizes, key=lambda size: (size % 2 == 0, size))


def load_config(recipe: str) -> ConfigDict:
    """Reads a recipe, "FILE.py" or "FILE.py:RUN", and returns its `get_config()`.

    Raises:
      InputError: no such file or run, or the file defines no `get_config`.
    """
    path, colon, run = recipe.partition(":")
    file = Path(path)
    if not file.is_file():
        raise InputError(f"config file {path} does not exist; recipes live in configs/")
    root = str(file.resolve().parent.parent)  # recipes import one another as configs.NAME
    if root not in sys.path:
        sys.path.insert(0, root)
    spec = importlib.util.spec_from_file_location(f"_recipe_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise InputError(f"config file {path} defines no get_config()")
    if not colon:
        return module.get_config()
    if not inspect.signature(module.get_config).parameters:
        raise InputError(f"config file {path} has one run only, not {run!r}; leave out ':{run}'")
    return module.get_config(run)


def write_config(config: ConfigDict, workdir: str) -> None:
    """Writes WORKDIR/config.json in one atomic step."""
    file = Path(workdir) / "config.json"
    partial = file.with_suffix(".json.tmp")
    with partial.open("w", encoding="utf-8") as opened:
        opened.write(config.to_json(indent=2, sort_keys=True) + "\n")
        opened.flush()
        os.fsync(opened.fileno())  # else a crash of the machine may leave the name without content
    os.replace(partial, file)


def changed_fields(config: ConfigDict, workdir: str) -> list[str]:
    """Lines "field: old → new" for what differs from the config of WORKDIR's last start.

    None without that config, or if it is damaged: it is a record, which nothing depends on.
    """
    try:
        old = _recipe((Path(workdir) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, AttributeError):
        return []
    new = recipe_fields(config)
    names = sorted(old.keys() | new.keys())
    return [f"{n}: {old.get(n)} → {new.get(n)}" for n in names if old.get(n) != new.get(n)]


def recipe_fields(config: ConfigDict) -> dict[str, object]:
    """The fields by name, GROUP.FIELD, with their values as JSON has them.

    Without `distributed`, which says what the processes are and not what they do.
    """
    return _recipe(config.to_json())


def _recipe(text: str) -> dict[str, object]:
    tree = json.loads(text)
    tree.pop("distributed", None)
    return _flatten(tree)


def _flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _check_range(
    config: ConfigDict, names: tuple[str, ...], holds: Callable[[float], bool], expected: str
) -> None:
    for name in names:
        if not holds(_get(config, name)):
            _refuse(config, name, expected)


def _get(config: ConfigDict, name: str) -> object:
    group, _, field = name.partition(".")
    return config[group][field]


def _refuse(config: ConfigDict, name: str, expected: str) -> None:
    raise InputError(f"config.{name} is {_get(config, name)!r}, but must be {expected}")
