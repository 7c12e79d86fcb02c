"""RegNetY-200MF on your own images: the teacher of folder.py.

Command: python main.py --config=configs/folder_teacher.py --config.dataset.root=ROOT --workdir=DIR
"""

from ml_collections import ConfigDict

from . import folder


def get_config() -> ConfigDict:
    """The images of folder.py, a convolutional network, and no teacher of its own."""
    config = folder.get_config()
    config.model.name = "regnety_002"
    config.model.drop_path_rate = 0.0
    config.distill.kind = "none"
    config.distill.teacher_config = ""
    config.optimizer.lr = 1e-3
    return config
