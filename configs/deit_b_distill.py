"""DeiT-B with a distillation token and a hard-label RegNetY-16GF teacher, ImageNet-1k, 300 epochs.

Paper: Touvron et al., "Training data-efficient image transformers & distillation through
attention" (arXiv 2012.12877), table 5 and appendix A. This is deit_distill.py's run "b".
Command: deit-jax train --config=deit_b_distill --workdir=DIR \\
    --config.dataset.root=TFDS_DATA_DIR --config.distill.teacher=TEACHER_MODEL_FOLDER
Hardware of the published run: 16 GPUs, 64 images each.
Expected: 83.4 % top-1 (published: 83.372), 87.3 M parameters; the teacher reaches 82.9 %.
Confidence in the settings: published command.
"""

from ml_collections import ConfigDict

from . import deit_distill


def get_config() -> ConfigDict:
    """Returns the recipe of DeiT-B with a distillation token, a teacher and its loss."""
    return deit_distill.get_config("b")
