"""DeiT-B, plain or distilled, fine-tuned from 224 to 384 pixels on ImageNet-1k, 30 epochs.

Paper: Touvron et al., "Training data-efficient image transformers & distillation through
attention" (arXiv 2012.12877), table 5.
Commands:
  deit-jax train --config=finetune_deit_384:b --workdir=DIR \\
      --config.dataset.root=TFDS_DATA_DIR --config.init_from=DEIT_B_RUN_OR_MODEL_FOLDER
  deit-jax train --config=finetune_deit_384:b_distilled --workdir=DIR \\
      --config.dataset.root=TFDS_DATA_DIR --config.init_from=DEIT_B_DISTILLED_RUN_OR_MODEL_FOLDER \\
      --config.distill.teacher=TEACHER_MODEL_FOLDER
Hardware of the published run: 16 GPUs, 32 images each.

| run | expected top-1 | confidence in the settings |
|---|---|---|
| b | 82.9 (82.890; 83.1 with --config.input.crop_ratio=1.0) | published command |
| b_distilled | 84.5 after 300 epochs at 224, 85.2 (85.224) after 1000 | medium: the paper alone |
"""

from ml_collections import ConfigDict

from deit_jax.config.fields import default_config

from . import common

RUNS = {"b": "deit_base_patch16_384", "b_distilled": "deit_base_distilled_patch16_384"}


def get_config(run: str = "b") -> ConfigDict:
    """Returns the pre-training's recipe at a small rate, constant after the warm-up."""
    config = default_config()
    config.init_from = common.PRETRAINED
    config.model.name = common.choose(RUNS, run, __file__)
    # The published models were fine-tuned in evaluation mode: no stochastic depth.
    config.model.drop_path_rate = 0.0
    config.input.image_size = 384
    config.mixing.group_size = 32
    config.optimizer.lr = 5e-6  # the reference scales: 5e-6 · batch / 512
    config.optimizer.weight_decay = 1e-8
    config.schedule.epochs = 30
    config.schedule.min_lr = 5e-6
    config.train.batch_size = 512
    if run == "b_distilled":
        config.distill.kind = "hard"
        config.distill.alpha = 0.5
    return config
