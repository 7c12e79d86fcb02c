"""A tiny DeiT trained on scikit-learn's handwritten digits, without a teacher.

1,797 grey images of 8×8 pixels, shown at 32×32, in a fixed stratified 80/20 split; no download.
Command: deit-jax train --config=digits --workdir=DIR
"""

from ml_collections import ConfigDict

from deit_jax.config.fields import default_config


def get_config() -> ConfigDict:
    """Returns the recipe of digits_distill.py without distillation token and teacher."""
    config = default_config()
    config.model.name = "deit_testing"
    config.model.patch_size = 8
    config.dataset.source = "digits"
    config.dataset.name = ""
    config.dataset.eval_split = "test"
    config.input.image_size = 32
    config.input.train_crop = "small"
    config.input.pad = 2
    config.input.hflip = 0.0  # a mirrored digit is no digit
    config.input.auto_augment = ""
    config.input.repeats = 1
    config.input.mean = (0.5, 0.5, 0.5)
    config.input.std = (0.5, 0.5, 0.5)
    config.mixing.mixup_alpha = 0.2
    config.mixing.cutmix_alpha = 0.0
    config.mixing.group_size = 8
    config.optimizer.lr = 3e-3
    config.schedule.epochs = 60
    config.schedule.per_epoch = False
    config.train.batch_size = 64
    config.train.dtype = "float32"
    config.train.ema_decay = 0.99
    config.train.log_every_steps = 44
    config.train.eval_every_epochs = 15
    config.checkpoint.every_epochs = 15
    return config
