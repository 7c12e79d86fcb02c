"""Your own images: DeiT-Ti distilled, DeiT-Ti plain, or any converted model fine-tuned.

Layout: ROOT/{train,val}/<class>/*.jpg (or .png), any number of classes; ROOT/<class>/*.jpg is split
by --config.dataset.eval_fraction; a flat ROOT/{train,val}/*.jpg works with
--config.dataset.label_file=labels.csv (rows "split/file,label").
Commands:
  deit-jax train --config=folder --workdir=DIR --config.dataset.root=ROOT
  deit-jax train --config=folder:finetune --workdir=DIR --config.dataset.root=ROOT \\
      --config.init_from=MODEL_FOLDER

| run | what it trains |
|---|---|
| distill | DeiT-Ti from scratch, and first its teacher, folder_teacher.py; --config.distill.teacher=FOLDER names one you have |
| plain | DeiT-Ti from scratch, without a teacher |
| finetune | the model of --config.init_from, at its own image size, with a new head |

With a few thousand images start from a trained model: finetune. Its batch, rate and epochs are
meant for these; for ten times as many images a third of the epochs will do.
Hardware: one GPU. Expected accuracy: depends on the data.
Confidence in the settings: medium, our own choice. From scratch they are DeiT's, scaled to a small
batch; finetune is what is usual for transformers of this size.
"""  # noqa: E501

from ml_collections import ConfigDict

from deit_jax.config.fields import default_config

from . import common


def _plain() -> ConfigDict:
    """Returns DeiT-Ti's recipe; the rate follows the reference's rule, 5e-4 · batch / 512."""
    config = default_config()
    config.model.name = "deit_tiny_patch16_224"
    config.dataset.source = "folder"
    config.dataset.name = ""
    config.dataset.eval_split = "val"
    config.input.auto_augment = ""
    config.input.repeats = 1
    config.optimizer.lr = 2.5e-4
    config.schedule.epochs = 100
    config.schedule.per_epoch = False
    config.train.batch_size = 256
    config.train.ema_decay = 0.0
    config.train.log_every_steps = 10
    return config


def _distill() -> ConfigDict:
    """Returns DeiT-Ti's recipe with a distillation token that learns from a teacher."""
    config = _plain()
    config.model.name = "deit_tiny_distilled_patch16_224"
    config.distill.kind = "hard"
    config.distill.teacher_config = "folder_teacher.py"
    return config


def _finetune() -> ConfigDict:
    """Returns the recipe for trained weights: a small rate, few epochs, images hardly changed."""
    config = _plain()
    config.init_from = common.PRETRAINED
    config.model.name = ""  # as in init_from
    config.model.drop_path_rate = 0.0
    config.input.image_size = 0  # as in init_from
    config.input.scale = (0.25, 1.0)
    config.mixing.random_erasing = 0.0
    config.mixing.prob = 0.0
    config.optimizer.lr = 1e-4
    config.schedule.epochs = 30
    config.train.batch_size = 64
    return config


RUNS = {"distill": _distill, "plain": _plain, "finetune": _finetune}


def get_config(run: str = "distill") -> ConfigDict:
    """Returns the recipe of a run, see the table above."""
    return common.choose(RUNS, run, __file__)()
