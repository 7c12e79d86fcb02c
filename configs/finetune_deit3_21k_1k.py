"""DeiT III fine-tuned on ImageNet-1k at 224 pixels, 50 epochs, after deit3_21k.py.

Paper: Touvron et al., "DeiT III: Revenge of the ViT" (arXiv 2204.07118), table 1.
Command: deit-jax train --config=finetune_deit3_21k_1k:b --workdir=DIR \\
    --config.dataset.root=TFDS_DATA_DIR --config.init_from=DEIT3_B_21K_RUN_OR_MODEL_FOLDER
A new head for the 1000 classes replaces that of 21k.

| run | hardware of the published run | expected top-1 |
|---|---|---|
| s | 16 GPUs, 128 images each | 83.1 (83.07) |
| b | 32 GPUs, 64 images each | 85.7 (85.70) |
| l | 32 GPUs, 64 images each | 87.0 (86.98) |
| h | 32 GPUs, 64 images each | 87.2 (87.18) |

Confidence in the settings: published commands.
"""

from ml_collections import ConfigDict

from . import common, deit3_21k

RUNS = {"s": 0.05, "b": 0.15, "l": 0.4, "h": 0.45}  # stochastic depth


def get_config(run: str = "b") -> ConfigDict:
    """Returns the recipe of the pre-training with fewer epochs, a smaller rate and other data."""
    drop_path_rate = common.choose(RUNS, run, __file__)
    config = deit3_21k.get_config(run)
    config.init_from = common.PRETRAINED
    config.model.drop_path_rate = drop_path_rate
    config.dataset.name = "imagenet2012"
    config.input.image_size = 224
    config.optimizer.lr = 3e-4
    config.schedule.epochs = 50
    return config
