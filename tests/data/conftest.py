"""Configs, images and an in-memory source for the tests of the input pipeline."""

import os
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from ml_collections import ConfigDict
from PIL import Image

from deit_jax.data import Source

_SAMPLE = os.environ.get(
    "DEIT_JAX_IMAGE_SAMPLE",
    str(Path(__file__).parents[3] / "shared" / "data" / "imagenet_sample"),
)


@pytest.fixture
def dataset_config():
    return ConfigDict(
        {
            "source": "folder",
            "name": "",
            "root": "",
            "train_split": "train",
            "eval_split": "val",
            "label_file": "",
            "num_classes": 0,
            "train_fraction": 1.0,
        }
    )


@pytest.fixture
def input_config():
    return ConfigDict(
        {
            "train_crop": "random_resized",
            "scale": (0.08, 1.0),
            "ratio": (3 / 4, 4 / 3),
            "pad": 4,
            "hflip": 0.5,
            "auto_augment": "",
            "repeats": 1,
            "interpolation": "bicubic",
            "crop_ratio": 0.875,
            "mean": (0.485, 0.456, 0.406),
            "on_bad_image": "error",
            "three_augment": False,
            "color_jitter": 0.0,
        }
    )


@pytest.fixture
def plain_config(input_config):
    """No augmentation: images pass unchanged."""
    input_config.update({"train_crop": "small", "pad": 0, "hflip": 0.0})
    return input_config


def picture(seed, height, width):
    """A smooth coloured picture with some noise and hard edges, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.arange(height)[:, None, None], np.arange(width)[:, None]
    waves = np.sin(x * rng.uniform(0.02, 0.3, 3) + y * rng.uniform(0.02, 0.3, 3))
    pixels = 128 + 90 * waves + rng.normal(0, 12, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return np.clip(pixels, 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def jpegs(tmp_path_factory):
    """Paths of JPEGs: real ones where the sample is at hand, and generated ones of odd kinds."""
    real = sorted(Path(_SAMPLE).glob("*/*/*.JPEG"))[::5]
    folder = tmp_path_factory.mktemp("jpegs")
    for number, (height, width) in enumerate([(375, 500), (500, 333), (97, 61), (40, 301)]):
        image = Image.fromarray(picture(number, height, width))
        for subsampling in (0, 1, 2):
            path = folder / f"{number}_{subsampling}.jpg"
            image.save(path, quality=85, subsampling=subsampling, progressive=subsampling == 1)
        image.convert("L").save(folder / f"{number}_grey.jpg")
        image.convert("CMYK").save(folder / f"{number}_cmyk.jpg")
    return real + sorted(folder.iterdir())


def permutation(num_examples, seed, epoch):
    """The examples in the order of an epoch, [num_examples]."""
    return tf.random.experimental.index_shuffle(
        tf.range(num_examples, dtype=tf.int64),
        seed=tf.constant([seed, epoch], tf.int64),
        max_index=num_examples - 1,
    ).numpy()


class CountingSource(Source):
    """Example i is a 4×4 image of value i with label i."""

    def __init__(self, num_examples, num_classes=None):
        super().__init__(
            description="counting",
            num_examples=num_examples,
            num_classes=num_classes or num_examples,
            class_names=(),
            encoded=False,
        )

    def fetch(self, index):
        return tf.fill((4, 4, 3), tf.cast(index, tf.uint8)), tf.cast(index, tf.int32)

    def fingerprint(self):
        return f"{self.num_examples:016x}"

    def example_id(self, index):
        return f"counting:{index}"


@pytest.fixture
def counting():
    return CountingSource
