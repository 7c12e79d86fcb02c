"""CIFAR-10 for two CPU cores: a small DeiT, plain and distilled from a RegNetY, at 64 pixels.

ROOT holds train/ and val/ with a folder for each class. As TFDS has it, add:
--config.dataset.source=tfds --config.dataset.name=cifar10 --config.dataset.eval_split=test
Commands:
  deit-jax train --config=cifar10:teacher --workdir=runs/teacher --config.dataset.root=ROOT
  deit-jax train --config=cifar10:hard --workdir=runs/hard --config.dataset.root=ROOT \\
      --config.distill.teacher=runs/teacher

| run | what it trains |
|---|---|
| teacher | RegNetY-200MF (2.8 M parameters), which halves the image five times: hence 64 pixels |
| plain | four blocks of 64 channels on 8 × 8 patches (0.2 M parameters), without a teacher |
| soft, hard | the same with a distillation token; the teacher is trained first, unless named |
| hard_scratch_token | the hard labels on the class token of the plain model |

A tenth of the images (--config.dataset.train_fraction=0.1) takes minutes on two cores;
experiments/distillation.py compares the runs on parts of the data, docs/experiments.md has what came
out. Confidence in the settings: low, our own choice; little of it has been tried.
"""  # noqa: E501

from ml_collections import ConfigDict

from deit_jax.config.fields import default_config

from . import common


def _plain() -> ConfigDict:
    """Returns the recipe of the student without a teacher; all others change only what they say."""
    config = default_config()
    config.model.update({"name": "deit_testing", "patch_size": 8, "drop_path_rate": 0.0})
    config.dataset.update({"source": "folder", "name": "", "eval_split": "val"})
    config.input.update({"image_size": 64, "train_crop": "small", "pad": 8, "auto_augment": ""})
    config.input.repeats = 1
    config.mixing.update({"random_erasing": 0.0, "group_size": 16})
    config.optimizer.lr = 2e-3
    config.schedule.update({"epochs": 40, "per_epoch": False})
    config.train.update({"batch_size": 64, "dtype": "float32", "ema_decay": 0.0})
    config.train.eval_every_epochs = 0
    config.checkpoint.every_epochs = 10
    return config


def _teacher() -> ConfigDict:
    config = _plain()
    config.model.update({"name": "regnety_002", "patch_size": 0})
    return config


def _hard_scratch_token() -> ConfigDict:
    config = _plain()
    config.distill.update({"kind": "hard", "teacher_config": "cifar10:teacher"})
    config.distill.class_head = True
    return config


def _hard() -> ConfigDict:
    config = _hard_scratch_token()
    config.model.name, config.distill.class_head = "deit_testing_distilled", False
    return config


def _soft() -> ConfigDict:
    """Returns the paper's soft distillation, section 4: a weight of 0.1 at a temperature of 3."""
    config = _hard()
    config.distill.update({"kind": "soft", "alpha": 0.1, "temperature": 3.0})
    config.distill.reduction = "batchmean"
    return config


RUNS = {
    "teacher": _teacher,
    "plain": _plain,
    "soft": _soft,
    "hard": _hard,
    "hard_scratch_token": _hard_scratch_token,
}


def get_config(run: str = "hard") -> ConfigDict:
    """Returns the recipe of a run, see the table above."""
    return common.choose(RUNS, run, __file__)()
