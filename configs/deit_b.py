"""DeiT-B on ImageNet-1k, 300 epochs, without a teacher: deit.py's run "b", and the default fields.

Paper: Touvron et al., "Training data-efficient image transformers & distillation through
attention" (arXiv 2012.12877), table 9, column DeiT-B.
Command: deit-jax train --config=deit_b --workdir=DIR --config.dataset.root=TFDS_DATA_DIR
Hardware of the published run: 16 GPUs, 64 images each.
Expected: 81.8 % top-1 (published: 81.846), 86.6 M parameters. Others report that a batch of 512, 10
epochs of warm-up, or mixing groups of 256 each cost 2.5 points or more.
Confidence in the settings: published command.
"""

from ml_collections import ConfigDict

from . import deit


def get_config() -> ConfigDict:
    """Returns the published recipe."""
    return deit.get_config("b")
