"""DeiT III on ImageNet-21k from scratch; finetune_deit3_21k_1k.py comes next.

Paper: Touvron et al., "DeiT III: Revenge of the ViT" (arXiv 2204.07118), table 1; for 90 epochs
table 13.
Command: deit-jax train --config=deit3_21k:b --workdir=DIR \\
    --config.dataset.root=TFDS_DATA_DIR

| run | pixels, epochs | hardware of the published run | expected, after fine-tuning on 1k |
|---|---|---|---|
| s | 224, 240 | 16 GPUs, 128 images each | 83.1 (83.07) |
| b | 224, 240 | 32 GPUs, 64 images each | 85.7 (85.70) |
| l | 224, 240 | 32 GPUs, 64 images each | 87.0 (86.98) |
| h | 128, 90 | 32 GPUs, 64 images each | 87.2 (87.18) |
| s_90, b_90, l_90 | 224, 90 | | 82.6, 85.2, 86.8 |

Confidence in the settings: s, b, l, h: published commands. *_90: medium, as others quote the paper.
The paper also mentions a batch of 4096 with a learning rate of 1.5e-3.

TFDS does not include ImageNet-21k. The recipe expects one that you prepared as imagenet21k, with
the splits train and validation; a folder ROOT/{train,val}/<class>/*.JPEG works too:
--config.dataset.source=folder --config.dataset.root=ROOT --config.dataset.eval_split=val.
The number of classes comes from the data, as the authors' list was not published. They evaluated on
ImageNet-1k's 50,000 validation images, among all classes of 21k (top-1 of s 54.1, b 56.5, l 57.4,
h 58.0 %).
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from . import common


class _Run(NamedTuple):
    model: str
    image_size: int
    epochs: int
    drop_path_rate: float
    group_size: int


RUNS = {
    "s": _Run("deit3_small_patch16_224", 224, 240, 0.05, 128),
    "b": _Run("deit3_base_patch16_224", 224, 240, 0.1, 64),
    "l": _Run("deit3_large_patch16_224", 224, 240, 0.3, 64),
    "h": _Run("deit3_huge_patch14_224", 128, 90, 0.5, 64),
    "s_90": _Run("deit3_small_patch16_224", 224, 90, 0.0, 128),
    "b_90": _Run("deit3_base_patch16_224", 224, 90, 0.1, 64),
    "l_90": _Run("deit3_large_patch16_224", 224, 90, 0.3, 64),
}


def get_config(run: str = "b") -> ConfigDict:
    """Returns the recipe: simple random crops, cutmix, smoothing, each image once an epoch."""
    row = common.choose(RUNS, run, __file__)
    config = common.deit3()
    config.model.name = row.model
    config.model.drop_path_rate = row.drop_path_rate
    config.dataset.name = "imagenet21k"
    config.input.image_size = row.image_size
    config.input.train_crop = "simple_random"
    config.input.repeats = 1
    config.mixing.mixup_alpha = 0.0
    config.mixing.group_size = row.group_size
    config.optimizer.lr = 1e-3
    config.optimizer.weight_decay = 0.02
    config.schedule.epochs = row.epochs
    return config
