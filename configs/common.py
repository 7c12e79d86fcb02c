"""What recipes share: where fine-tuning starts, tables of runs, and DeiT III's own choices."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from ml_collections import ConfigDict

from deit_jax.config.fields import default_config
from deit_jax.errors import InputError

# The `init_from` of fine-tuning recipes: no folder is called so, and the refusal of a run that was
# started without one shows this name.
PRETRAINED = "PRETRAINED_MODEL_FOLDER"

Row = TypeVar("Row")


def choose(runs: Mapping[str, Row], run: str, file: str) -> Row:
    """The row of a recipe's table of runs that --config=FILE:RUN asks for.

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
    """DeiT III from scratch, as on ImageNet-1k and -21k: LAMB, 3-Augment, whole images in eval.

    The paper's rates are effective ones, not scaled by the batch.
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
