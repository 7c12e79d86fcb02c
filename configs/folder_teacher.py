"""RegNetY-200MF on your own images: the teacher of folder.py.

Command: deit-jax train --config=folder_teacher --workdir=DIR --config.dataset.root=ROOT
"""

from ml_collections import ConfigDict

from . import folder


def get_config() -> ConfigDict:
    """Returns the recipe of folder.py's plain run with a convolutional network."""
    config = folder.get_config("plain")
    config.model.name = "regnety_002"
    config.model.drop_path_rate = 0.0
    config.optimizer.lr = 1e-3
    return config
