"""DeiT-Ti, -S and -B on ImageNet-1k, 300 epochs, without a teacher.

Paper: Touvron et al., "Training data-efficient image transformers & distillation through
attention" (arXiv 2012.12877), table 9: one recipe for all three sizes, tuned for B.
Command: deit-jax train --config=deit:ti --workdir=DIR \\
    --config.dataset.root=TFDS_DATA_DIR

Confidence in the settings: published commands.

| run | hardware of the published run | expected top-1 | parameters |
|---|---|---|---|
| ti | 4 GPUs, 256 images each | 72.2 (72.202) | 5.7 M |
| s | 4 GPUs, 256 images each | 79.9 (79.854) | 22.1 M |
| b | 16 GPUs, 64 images each | 81.8 (81.846) | 86.6 M |
"""

from ml_collections import ConfigDict

from deit_jax.config.fields import default_config

from . import common

RUNS = {  # model, and images per GPU, which share a draw of mixup and cutmix
    "ti": ("deit_tiny_patch16_224", 256),
    "s": ("deit_small_patch16_224", 256),
    "b": ("deit_base_patch16_224", 64),
}


def get_config(run: str = "b") -> ConfigDict:
    """Returns the published recipe; B's is `fields.default_config` itself."""
    config = default_config()
    config.model.name, config.mixing.group_size = common.choose(RUNS, run, __file__)
    return config
