import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageFilter

from deit_jax.data.pillow.blur import gaussian_blur
from tests.data.conftest import picture

# The box reaches one pixel further from here on.
_WIDER = np.float32(np.sqrt(2))
_AROUND = [_WIDER + np.float32(step * 1.2e-7) for step in range(-8, 9)]


def _check(image, radius):
    want = Image.fromarray(image).filter(ImageFilter.GaussianBlur(float(radius)))
    got = gaussian_blur(tf.constant(image), tf.constant(radius, tf.float32))
    np.testing.assert_array_equal(got, want, err_msg=f"{image.shape}, radius {radius}")


def test_equals_pillow_at_every_radius():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (36, 48, 3), dtype=np.uint8)
    images = [
        noise,
        (noise > 127).astype(np.uint8) * 255,
        picture(0, 36, 48),
        noise // 64 + 126,  # few levels, where rounding decides
        np.full((36, 48, 3), (0, 255, 77), np.uint8),
    ]
    for number, radius in enumerate([*np.linspace(0.1, 2.4, 231), *_AROUND]):
        _check(images[number % len(images)], np.float32(radius))
    for radius in rng.uniform(0.1, 2.0, 200):
        _check(images[rng.integers(0, 4)], np.float32(radius))


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 3), (4, 1)])
def test_images_narrower_than_the_box(shape):
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for radius in (0.1, 0.9, 1.5, 2.0, 2.4):
        _check(image, radius)
