"""CaiT fine-tuned on ImageNet-1k at 384 or 448 pixels with the teacher, 60 epochs.

Paper: Touvron et al., "Going deeper with Image Transformers" (arXiv 2103.17239).
Command: deit-jax train --config=finetune_cait:s24_384 --workdir=DIR \\
    --config.dataset.root=TFDS_DATA_DIR --config.init_from=CAIT_S24_RUN_OR_MODEL_FOLDER \\
    --config.distill.teacher=TEACHER_MODEL_FOLDER

| run | starts from | expected top-1 | confidence in the settings |
|---|---|---|---|
| xxs24_384 | cait_distill.py:xxs24 | 81.0 | low: as m48_448 |
| xxs36_384 | cait_distill.py:xxs36 | 82.2 | low: as m48_448 |
| xs24_384 | cait_distill.py:xs24 | 84.1 | low: as m48_448 |
| s24_384 | cait_distill.py:s24 | 85.1 | low: as m48_448 |
| s36_384 | cait_distill.py:s36 | 85.4 | low: as m48_448 |
| m36_384 | cait_distill.py:m36 | 86.1 | low: as m48_448 |
| m48_448 | cait_distill.py:m48 | 86.5 | high: an author's list (issue 108 of the reference) |

Where nothing was published, the drop path is that of the training at 224 pixels. The list has no
lowest rate: it is constant after the warm-up, as in DeiT's fine-tuning.
"""

from ml_collections import ConfigDict

from deit_jax.config.fields import default_config

from . import cait_distill, common

RUNS = {  # the run of cait_distill.py, the model and its pixels
    f"{size}_{pixels}": (size, f"cait_{size}_{pixels}", pixels)
    for size, pixels in [
        *((size, 384) for size in cait_distill.RUNS if size != "m48"),
        ("m48", 448),
    ]
}


def get_config(run: str = "s24_384") -> ConfigDict:
    """Returns DeiT's recipe at a small rate and a small batch, with a teacher."""
    size, name, pixels = common.choose(RUNS, run, __file__)
    config = default_config()
    config.init_from = common.PRETRAINED
    config.model.name = name
    config.model.drop_path_rate = cait_distill.RUNS[size][1]
    config.input.image_size = pixels
    config.input.crop_ratio = 1.0
    config.distill.kind = "hard"
    config.distill.alpha = 0.5
    config.optimizer.lr = 5e-6
    config.schedule.epochs = 60
    config.schedule.min_lr = 5e-6
    config.train.batch_size = 256
    return config
