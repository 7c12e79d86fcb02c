"""A small RegNetY trained on scikit-learn's handwritten digits: the teacher of digits_distill.py.

Command: python main.py --config=configs/digits_teacher.py --workdir=DIR
"""

from ml_collections import ConfigDict

from . import digits


def get_config() -> ConfigDict:
    """The digits recipe with a convolutional network instead of a transformer."""
    config = digits.get_config()
    config.model.name = "regnety_testing"
    config.model.patch_size = 0
    config.model.drop_path_rate = 0.0
    config.optimizer.lr = 3e-3
    config.schedule.epochs = 20
    return config
