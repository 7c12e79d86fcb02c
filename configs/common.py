"""What the recipes share: the choice of a run, and DeiT III's settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from ml_collections import ConfigDict

from deit_jax.config.fields import PRETRAINED, default_config
from deit_jax.errors import InputError

Row = TypeVar("Row")


def choose(runs: Mapping[str, Row], run: str, file: str) -> Row:
    """Returns the entry of a recipe's table that --config=RECIPE:RUN asks for.

    Raises:
      InputError: there is no such run.
    """
    if run not in runs:
        name = Path(file).stem
        raise InputError(
            f"recipe {name} has no run {run!r}, only {', '.join(runs)}; choose one, as in "
            f"--config={name}:{next(iter(runs))}"
        )
    return runs[run]


def deit3() -> ConfigDict:
    """Returns what DeiT III uses on ImageNet-1k and -21k: LAMB, 3-Augment, evaluation uncropped.

    The paper's learning rates are effective ones, not scaled by the batch.
    """
    config = default_config()
    config.input.auto_augment = ""
    config.input.three_augment = True
    config.input.color_jitter = 0.3
    config.input.crop_ratio = 1.0
    config.mixing.random_erasing = 0.0
    config.optimizer.name = "lamb"
    config.optimizer.clip_norm = 1.0
    config.train.batch_size = 2048
    return config


def finetune_deit3() -> ConfigDict:
    """Returns what DeiT III uses for 20 epochs at a small rate after its pre-training.

    DeiT's augmentation and loss without erasing and repeats.
    """
    config = default_config()
    config.init_from = PRETRAINED
    config.input.repeats = 1
    config.input.crop_ratio = 1.0
    config.mixing.random_erasing = 0.0
    config.optimizer.lr = 1e-5  # effective: not scaled by the batch
    config.optimizer.weight_decay = 0.1
    config.schedule.epochs = 20
    config.train.batch_size = 512
    return config
