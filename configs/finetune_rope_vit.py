"""RoPE-ViT fine-tuned on ImageNet-1k at 224 pixels, 20 epochs, after rope_vit.py at 192.

Paper: Heo et al., "Rotary Position Embedding for Vision Transformer" (arXiv 2403.13298).
Command: deit-jax train --config=finetune_rope_vit:b --workdir=DIR \\
    --config.dataset.root=TFDS_DATA_DIR --config.init_from=ROPE_VIT_B_RUN_OR_MODEL_FOLDER
For another kind of positions than RoPE-mixed, add the --config.model.name that rope_vit.py got.

| run | starts from | hardware of the published run | expected top-1 |
|---|---|---|---|
| b | rope_vit.py:b | 8 GPUs, 64 images each | 83.8; 84.4 at 384 pixels |
| l | rope_vit.py:l | 64 GPUs, 8 images each | 84.8; 85.6 at 384 pixels |

Confidence in the settings: published commands.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from . import common


class _Run(NamedTuple):
    model: str
    drop_path_rate: float
    group_size: int


RUNS = {
    "b": _Run("vit_base_patch16_rope_mixed_224", 0.2, 64),
    "l": _Run("vit_large_patch16_rope_mixed_224", 0.45, 8),
}


def get_config(run: str = "b") -> ConfigDict:
    """Returns the fine-tuning of DeiT III."""
    row = common.choose(RUNS, run, __file__)
    config = common.finetune_deit3()
    config.model.name = row.model
    config.model.drop_path_rate = row.drop_path_rate
    config.input.image_size = 224
    config.mixing.group_size = row.group_size
    return config
