"""ViT-5 fine-tuned on ImageNet-1k at 224 pixels or at 384, 20 epochs, after vit5.py.

Paper: Wang et al., "ViT-5: Vision Transformers for the Mid-2020s" (arXiv 2602.08071).
Command: deit-jax train --config=finetune_vit5:b_224 --workdir=DIR \\
    --config.dataset.root=TFDS_DATA_DIR --config.init_from=VIT5_B_RUN/model_ema
The authors start from the EMA. After a run _ce of vit5.py, add the ending: finetune_vit5:b_224_ce.

| run | starts from | hardware of the published run | expected top-1 |
|---|---|---|---|
| s_224 | vit5.py:s | 8 GPUs, 64 images each | 82.2 |
| b_224 | vit5.py:b | 8 GPUs, 64 images each | 84.2 |
| l_224 | vit5.py:l | 8 GPUs, 64 images each | 84.9 |
| b_384 | this b_224 | 8 GPUs, 64 images each | 85.4 |
| l_384 | this l_224 | 8 GPUs, 64 images each | 86.0 |
| s_224_ce, b_224_ce, l_224_ce, b_384_ce, l_384_ce | as above | | 82.2 (s) |

Confidence in the settings: *_224: published commands. *_384: medium, the same settings at 384
pixels; the authors publish the weights, but neither a command nor where they start. *_ce: our own
choice, the authors' fine-tuning of the reproduced models.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from . import common


class _Run(NamedTuple):
    model: str
    image_size: int
    drop_path_rate: float


_PUBLISHED = {
    "s_224": _Run("vit5_small_patch16_224", 224, 0.05),
    "b_224": _Run("vit5_base_patch16_224", 224, 0.25),
    "l_224": _Run("vit5_large_patch16_224", 224, 0.5),
    "b_384": _Run("vit5_base_patch16_384", 384, 0.25),
    "l_384": _Run("vit5_large_patch16_384", 384, 0.5),
}
RUNS = _PUBLISHED | {f"{name}_ce": row for name, row in _PUBLISHED.items()}


def get_config(run: str = "b_224") -> ConfigDict:
    """Returns the fine-tuning of DeiT III."""
    row = common.choose(RUNS, run, __file__)
    config = common.finetune_deit3()
    config.model.name = row.model
    config.model.drop_path_rate = row.drop_path_rate
    config.input.image_size = row.image_size
    config.mixing.group_size = 64
    if run.endswith("_ce"):
        config.model.options = "linear_bias=False"
    return config
