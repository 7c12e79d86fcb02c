"""A tiny DeiT distilled from a RegNetY teacher on scikit-learn's handwritten digits, end to end.

Trains the teacher first, unless WORKDIR/teacher holds one. Two CPU cores are enough.
Command: deit-jax train --config=digits_distill --workdir=runs/digits
"""

from ml_collections import ConfigDict

from . import digits


def get_config() -> ConfigDict:
    """Returns the recipe of digits.py with hard-label distillation, as for DeiT-B."""
    config = digits.get_config()
    config.model.name = "deit_testing_distilled"
    config.distill.kind = "hard"
    config.distill.alpha = 0.5
    config.distill.teacher_config = "digits_teacher.py"
    return config
