"""ResMLP on ImageNet-1k, 400 epochs, from the labels alone or with a RegNetY-16GF teacher.

Paper: Touvron et al., "ResMLP: Feedforward networks for image classification with data-efficient
training" (arXiv 2105.03404).
Commands:
  deit-jax train --config=resmlp:12 --workdir=DIR --config.dataset.root=TFDS_DATA_DIR
  deit-jax train --config=resmlp:12_distill --workdir=DIR \\
      --config.dataset.root=TFDS_DATA_DIR --config.distill.teacher=TEACHER_MODEL_FOLDER

| run | expected top-1 | parameters | confidence in the settings |
|---|---|---|---|
| 12 | 76.7 | 15.4 M | high: an author's list (issue 106 of the reference) |
| 24 | 79.4 | 30.0 M | high: as 12, with the drop path of issue 117 |
| 36, big_24 | 79.8, 81.0 | 44.7 M, 129.1 M | medium: as 12; drop path: ours, after CaiT's |
| 12_distill, 24_distill | 78.0, 80.8 | as above | medium: how the one head is taught is not said |
| 36_distill, big_24_distill | 81.2, 83.6 | as above | medium: both |

The teacher's part is DeiT's hard distillation, of the only head: half labels, half teacher. The
rate was published with LAMB (gradients clipped at 1, as apex does) and without half precision.
Weights over the patches fix the image size: there is no fine-tuning at another resolution.
"""

from ml_collections import ConfigDict

from deit_jax.config.fields import default_config

from . import common

_SIZES = {"12": 0.05, "24": 0.1, "36": 0.2, "big_24": 0.2}  # drop path
RUNS = {
    f"{size}{kind}": (f"resmlp_{size}_224", rate, bool(kind))
    for kind in ("", "_distill")
    for size, rate in _SIZES.items()
}


def get_config(run: str = "24") -> ConfigDict:
    """Returns DeiT's augmentation and loss with LAMB, the same drop path in all blocks."""
    config = default_config()
    config.model.name, config.model.drop_path_rate, distilled = common.choose(RUNS, run, __file__)
    config.input.crop_ratio = 0.9
    if distilled:
        config.distill.kind = "hard"
        config.distill.alpha = 0.5
    config.optimizer.name = "lamb"
    config.optimizer.lr = 5e-3
    config.optimizer.weight_decay = 0.2
    config.optimizer.clip_norm = 1.0
    config.schedule.epochs = 400
    config.train.batch_size = 2048
    config.train.dtype = "float32"
    return config
