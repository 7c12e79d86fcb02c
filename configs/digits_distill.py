"""A tiny DeiT distilled from a RegNetY teacher on scikit-learn's handwritten digits, end to end.

Trains the teacher first where WORKDIR/teacher holds none; everything runs on two CPU cores.
Command: python main.py --config=configs/digits_distill.py --workdir=runs/digits
"""

from ml_collections import ConfigDict

from . import digits


def get_config() -> ConfigDict:
    """The student of digits.py with hard-label distillation, as DeiT-B is distilled."""
    config = digits.get_config()
    config.model.name = "deit_testing_distilled"
    config.distill.kind = "hard"
    config.distill.alpha = 0.5
    config.distill.teacher_config = "digits_teacher.py"
    return config
