"""Checks the values of a config, and that they go together."""

import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from ml_collections import ConfigDict

from deit_jax.config.randaugment_policy import parse_policy
from deit_jax.config.structure import check_structure, flatten
from deit_jax.errors import InputError

CHOICES = {
    "dataset.source": ("tfds", "folder", "digits", "hf"),
    "input.train_crop": ("random_resized", "simple_random", "small"),
    "input.on_bad_image": ("error", "skip"),
    "input.interpolation": ("bicubic", "bilinear"),
    "model.attention": ("auto", "xla", "xla_remat", "pallas", "cudnn"),
    "distill.kind": ("none", "hard", "soft"),
    "distill.reduction": ("numel", "batchmean"),
    "optimizer.name": ("adamw", "lamb", "sgd"),
    "train.loss": ("cross_entropy", "bce"),
    "train.dtype": ("bfloat16", "float32", "float32_fast"),
    "parallel.backend": ("jit", "pmap"),
}
CHANGEABLE = (  # what `checkpoint.accept_changes` may name; see training/continuation.py
    *("train.batch_size", "train.seed", "input.repeats", "mixing.group_size", "steps_per_epoch"),
    *("data", "schedule.epochs"),
)
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {  # what must hold of which fields
    "at least 1": (
        lambda value: value >= 1,
        "input.image_size input.repeats mixing.group_size schedule.epochs train.batch_size "
        "train.accumulate_steps train.log_every_steps train.max_nonfinite_steps parallel.fsdp "
        "checkpoint.keep distributed.num_processes distributed.start_timeout",
    ),
    "between 0 and 1": (
        lambda value: 0 <= value <= 1,
        "model.drop_path_rate input.hflip mixing.random_erasing mixing.prob mixing.switch_prob "
        "mixing.smoothing distill.alpha",
    ),
    "0 or more": (
        lambda value: value >= 0,
        "model.patch_size dataset.num_classes input.read_threads input.pad input.color_jitter "
        "mixing.mixup_alpha mixing.cutmix_alpha distill.teacher_epochs optimizer.lr "
        "optimizer.weight_decay optimizer.clip_norm schedule.warmup_epochs schedule.warmup_lr "
        "schedule.min_lr train.seed train.eval_every_epochs checkpoint.every_epochs "
        "checkpoint.every_steps distributed.process_id",
    ),
    "greater than 0": (lambda value: value > 0, "distill.temperature optimizer.eps"),
    "in (0, 1]": (lambda value: 0 < value <= 1, "input.crop_ratio dataset.train_fraction"),
    "in [0, 1)": (
        lambda value: 0 <= value < 1,
        "dataset.eval_fraction optimizer.b1 optimizer.b2 optimizer.momentum train.ema_decay",
    ),
    "below 2^32": (lambda value: value < 2**32, "train.seed"),
    "at most 16384": (lambda value: value <= 2**14, "input.image_size"),
    "at most 1000000": (
        lambda value: value <= 10**6,
        "schedule.epochs distill.teacher_epochs distributed.start_timeout",
    ),
    "at most 4096": (lambda value: value <= 2**12, "input.read_threads input.repeats"),
    "fractions of the brightest pixel, from 0 to 1": (
        lambda value: 0 <= min(value) <= max(value) <= 1,
        "input.mean",
    ),
    "numbers greater than 0 and at most 1": (
        lambda value: 0 < min(value) <= max(value) <= 1,
        "input.std",
    ),
    "two numbers, 0 < low <= high": (
        lambda value: 0 < value[0] <= value[1],
        "input.scale input.ratio",
    ),
}


def validate(config: ConfigDict) -> None:
    """Checks names, types, ranges and combinations that need no data and no device.

    Raises:
      InputError: the first field that is wrong, what it holds and what it may hold.
    """
    check_structure(config)
    for name in ("model.name", "input.image_size"):
        if not _get(config, name):
            refuse(config, name, "set, or config.init_from a model folder to take it from")
    for name, choices in CHOICES.items():
        if _get(config, name) not in choices:
            refuse(config, name, f"one of {', '.join(choices)}")
    for name, value in flatten(config.to_dict()).items():
        if type(value) is int and value >= 2**31 and name != "train.seed":
            refuse(config, name, "below 2^31")
        if not all(map(math.isfinite, _floats(value))):
            refuse(config, name, "finite")
    for expected, (holds, names) in RANGES.items():
        for name in names.split():
            if not holds(_get(config, name)):
                refuse(config, name, expected)
    if set(config.checkpoint.accept_changes.split()) - {*CHANGEABLE}:
        refuse(config, "checkpoint.accept_changes", f"names of {', '.join(CHANGEABLE)}")
    for pattern in config.optimizer.trainable.split():
        try:
            re.compile(pattern)
        except re.error as error:
            refuse(config, "optimizer.trainable", f"regular expressions ({pattern!r}: {error})")
    if config.input.auto_augment:
        try:
            parse_policy(config.input.auto_augment)
        except InputError as error:
            raise InputError(f"config.input.auto_augment: {error}") from None
        if config.input.three_augment:
            refuse(config, "input.three_augment", "False, or input.auto_augment ''")
    if config.distill.kind == "none" and (config.distill.teacher or config.distill.teacher_config):
        refuse(config, "distill.kind", "hard or soft with a distill.teacher or teacher_config")
    if config.distill.kind == "none" and config.distill.class_head:
        refuse(config, "distill.class_head", "False where distill.kind is 'none'")
    if config.distill.kind != "none" and not 0 < config.distill.alpha < 1:
        refuse(config, "distill.alpha", "greater than 0 and less than 1, so that both heads learn")
    if config.train.loss == "bce" and config.mixing.smoothing:
        refuse(config, "mixing.smoothing", "0 where train.loss is 'bce', which takes whole labels")
    if config.train.cosub and not config.model.drop_path_rate:
        refuse(config, "train.cosub", "False where model.drop_path_rate is 0: no two submodels")
    if config.train.cosub and config.distill.kind != "none":
        refuse(config, "train.cosub", "False where distill.kind is not 'none': it has no teacher")
    if config.dataset.label_file and config.dataset.source != "folder":
        refuse(config, "dataset.label_file", "'' where dataset.source is not 'folder'")
    if config.parallel.backend == "pmap" and config.parallel.fsdp > 1:
        refuse(config, "parallel.fsdp", "1 where parallel.backend is 'pmap', which shards nothing")
    if not _is_curve(config.train.expected_top1):
        refuse(config, "train.expected_top1", "pairs (epoch, top-1 in percent), epochs rising")
    distributed = config.distributed
    address, several = distributed.coordinator_address, distributed.num_processes > 1
    if (several or address) and not address.rpartition(":")[2].isdigit():
        refuse(config, "distributed.coordinator_address", "HOST:PORT of process 0")
    if distributed.process_id >= distributed.num_processes:
        refuse(config, "distributed.process_id", "less than distributed.num_processes")


def _floats(value: object) -> Iterator[float]:
    """Yields the numbers with a point in a value, also those in tuples."""
    for each in value if isinstance(value, tuple) else (value,):
        if isinstance(each, tuple):
            yield from _floats(each)
        elif isinstance(each, float):
            yield each


def _is_curve(pairs: tuple) -> bool:
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and type(pair[0]) is int):
            return False
        if not (isinstance(pair[1], (int, float)) and 0 <= pair[1] <= 100):
            return False
    epochs = [0, *(pair[0] for pair in pairs)]
    return all(before < after for before, after in itertools.pairwise(epochs))


def _get(config: ConfigDict, name: str) -> object:
    group, _, field = name.partition(".")
    return config[group][field]


def refuse(config: ConfigDict, name: str, expected: str) -> NoReturn:
    """Raises InputError: what the field `name` (GROUP.FIELD) holds, and what it must be."""
    raise InputError(f"config.{name} is {_get(config, name)!r}, but must be {expected}")
