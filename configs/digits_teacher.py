"""A small RegNetY trained on scikit-learn's handwritten digits: the teacher of digits_distill.py.

Command: deit-jax train --config=digits_teacher --workdir=DIR
"""

from ml_collections import ConfigDict

from . import digits


def get_config() -> ConfigDict:
    """Returns the recipe of digits.py with a convolutional network for the transformer."""
    config = digits.get_config()
    config.model.name = "regnety_testing"
    config.model.patch_size = 0
    config.model.drop_path_rate = 0.0
    config.schedule.epochs = 40
    return config
