"""DeiT-Ti distilled on your own images, from a teacher that is trained on them first.

Layout: ROOT/{train,val}/<class>/*.jpg (or .png), any number of classes; a flat
ROOT/{train,val}/*.jpg works with --config.dataset.label_file=labels.csv (rows "split/file,label").
Command: python main.py --config=configs/folder.py --config.dataset.root=ROOT --workdir=DIR
The teacher is configs/folder_teacher.py; --config.distill.teacher=FOLDER names one you have.
Settings are DeiT's, scaled to a small batch; expect to tune epochs and rate to your data.
"""

from ml_collections import ConfigDict

from deit_jax.config.fields import default_config


def get_config() -> ConfigDict:
    """DeiT-Ti distilled; the rate follows the reference's rule, 5e-4 · batch / 512."""
    config = default_config()
    config.model.name = "deit_tiny_distilled_patch16_224"
    config.dataset.source = "folder"
    config.dataset.name = ""
    config.dataset.eval_split = "val"
    config.input.auto_augment = ""
    config.input.repeats = 1
    config.distill.kind = "hard"
    config.distill.teacher_config = "folder_teacher.py"
    config.optimizer.lr = 2.5e-4
    config.schedule.epochs = 100
    config.train.batch_size = 256
    config.train.ema_decay = 0.0
    config.train.log_every_steps = 10
    return config
