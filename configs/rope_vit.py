"""RoPE-ViT: DeiT III with rotary position embeddings, on ImageNet-1k from scratch, 400 epochs.

Paper: Heo et al., "Rotary Position Embedding for Vision Transformer" (arXiv 2403.13298).
Command: deit-jax train --config=rope_vit:b --workdir=DIR \\
    --config.dataset.root=TFDS_DATA_DIR
The runs train RoPE-mixed; --config.model.name=vit_base_patch16_rope_224 (or _rope_ape_224,
_rope_mixed_ape_224) trains another kind with the same settings. B and L train at 192 pixels and
then need finetune_rope_vit.py. Larger images need no fine-tuning: deit-jax eval --workdir=DIR
--config.input.image_size=384. The table gives top-1 of the mixed kind at the end of both.

| run | pixels | hardware of the published run | top-1 at 224 | top-1 at 384 |
|---|---|---|---|---|
| s | 224 | 8 GPUs, 256 images each | 80.9 | 81.8 |
| b | 192 | 8 GPUs, 256 images each | 83.8 after fine-tuning | 84.4 |
| l | 192 | 64 GPUs, 32 images each | 84.8 after fine-tuning | 85.6 |

Confidence in the settings: published commands (naver-ai/rope-vit) for the mixed kind of every size;
the paper trains the other kinds alike.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from . import common


class _Run(NamedTuple):
    model: str
    image_size: int
    lr: float
    drop_path_rate: float
    group_size: int


RUNS = {
    "s": _Run("vit_small_patch16_rope_mixed_224", 224, 4e-3, 0.0, 256),
    "b": _Run("vit_base_patch16_rope_mixed_224", 192, 3e-3, 0.1, 256),
    "l": _Run("vit_large_patch16_rope_mixed_224", 192, 3e-3, 0.4, 32),
}


def get_config(run: str = "b") -> ConfigDict:
    """Returns DeiT III's recipe of 400 epochs with its authors' weight decay."""
    row = common.choose(RUNS, run, __file__)
    config = common.deit3()
    config.model.name = row.model
    config.model.drop_path_rate = row.drop_path_rate  # the same in all blocks
    config.input.image_size = row.image_size
    config.mixing.smoothing = 0.0
    config.mixing.group_size = row.group_size
    config.optimizer.lr = row.lr
    config.optimizer.weight_decay = 0.03
    config.schedule.epochs = 400
    config.train.loss = "bce"
    return config
