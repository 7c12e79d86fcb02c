"""Files → batches against timm's whole chains on PIL, with our draws put into timm's operations."""

import copy

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from deit_jax import data
from deit_jax.config.randaugment_policy import parse_policy
from deit_jax.data import randaugment, transforms
from deit_jax.data.crop import draw_box
from deit_jax.data.draws import fold
from tests.data.conftest import plan_of
from tests.oracles.torchvision_ops import import_torchvision

import_torchvision()

from timm.data import auto_augment as timm_augment  # noqa: E402
from timm.data import create_transform  # noqa: E402

_SIZE, _SEED = 64, 5
_POLICY = "rand-m9-mstd0.5-inc1"


class _DrawnRandAugment:
    """timm's RandAugment with our choices in place of its own."""

    def __init__(self, theirs, monkeypatch):
        self.theirs, self.monkeypatch = theirs, monkeypatch
        self.draws = None

    def __call__(self, image):
        for number, applied, level, negative in zip(*self.draws, strict=True):
            operation = copy.copy(self.theirs.ops[number])
            operation.prob = float(applied)
            operation.magnitude, operation.magnitude_std = level, 0
            self.monkeypatch.setattr(
                timm_augment, "_randomly_negate", lambda v, sign=-1 if negative else 1: sign * v
            )
            try:
                image = operation(image)
            except ValueError:  # Pillow refuses 0 bits, of which earlier versions made black
                assert operation.name == "PosterizeIncreasing"
                image = Image.new("RGB", image.size)
        return image


def _flips(seed):
    probe = transforms.random_flip(
        tf.constant([[[0], [1]]]), fold(seed, transforms._FLIP), probability=0.5
    )
    return bool(probe[0, 0, 0])


@pytest.mark.slow
@pytest.mark.parametrize(("repeats", "steps"), [(1, 4), (3, 6)])
def test_training_images_are_timms(
    sample_images, dataset_config, input_config, monkeypatch, repeats, steps
):
    """200 views; they are equal but for a pixel of the geometry here and there."""
    dataset_config.root = str(sample_images)
    input_config.update({"auto_augment": _POLICY, "repeats": repeats})
    source = data.open_source(dataset_config, "train")
    batch_size = min(20, source.num_examples)
    sizes = {"image_size": _SIZE, "batch_size": batch_size, "steps_per_epoch": repeats}
    plan = plan_of(input_config, seed=_SEED, **sizes)
    chain = create_transform(
        _SIZE,
        is_training=True,
        use_prefetcher=True,  # uint8 comes out; the rest is done on the device
        auto_augment=_POLICY,
        interpolation="bicubic",
        mean=input_config.mean,
    )
    crop, flip, augment, _ = chain.transforms
    chain.transforms[2] = drawn = _DrawnRandAugment(augment, monkeypatch)
    how = {name: input_config[name] for name in ("scale", "ratio")}

    batches = data.train_batches(source, plan)
    differences = []
    for step in range(steps):
        batch = next(batches)
        for row, name in enumerate(data.example_ids(source, plan, step)):
            image = Image.open(name).convert("RGB")
            seed = tf.constant([_SEED, step * batch_size + row], tf.int64)
            height_width = tf.unstack(tf.constant(image.size[::-1]))
            box = draw_box(*height_width, fold(seed, transforms._CROP), **how)
            crop.get_params = lambda *_, box=box: box.numpy().tolist()
            flip.p = float(_flips(seed))
            drawn.draws = [
                draw.numpy().tolist()
                for draw in randaugment.draw(fold(seed, transforms._AUGMENT), parse_policy(_POLICY))
            ]
            difference = np.abs(
                batch["image"][row] - chain(image).permute(1, 2, 0).numpy().astype(int)
            )
            differences.append(difference.mean())
    assert max(differences) < 1e-3
    assert np.median(differences) == 0


def test_evaluation_images_are_timms(sample_images, dataset_config, input_config):
    dataset_config.root = str(sample_images)
    chain = create_transform(_SIZE, use_prefetcher=True, interpolation="bicubic", crop_pct=0.875)
    source = data.open_source(dataset_config, "eval")
    count = 0
    for batch in data.eval_batches(source, plan_of(input_config, image_size=_SIZE, batch_size=16)):
        for row in np.flatnonzero(batch["mask"]):
            image = Image.open(source.example_id(count)).convert("RGB")
            want = chain(image).permute(1, 2, 0)
            np.testing.assert_array_equal(batch["image"][row], want)
            count += 1
    assert count == source.num_examples
