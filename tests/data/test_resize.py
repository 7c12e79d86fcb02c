"""The resize against Pillow's, to the bit."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from deit_jax.data.pillow.resize import resize


def _noise(seed, height, width, *, black_and_white=False):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return (image > 127).astype(np.uint8) * 255 if black_and_white else image


def _check(image, to, interpolation="bicubic"):
    want = Image.fromarray(image).resize(to[::-1], Image.Resampling[interpolation.upper()])
    got = resize(tf.constant(image), to, interpolation=interpolation)
    np.testing.assert_array_equal(got, np.asarray(want), err_msg=f"{image.shape} → {to}")


@pytest.mark.parametrize(
    "interpolation", ["bicubic", pytest.param("bilinear", marks=pytest.mark.slow)]
)
def test_random_sizes(interpolation):
    rng = np.random.default_rng(0)
    sizes = [(64, 64)] * 20 + [(224, 224)] * 5 + [(1, 1), (7, 93), (150, 31)] * 3
    for case, to in enumerate(sizes):
        # From 1 pixel to 300 on each side: every mix of reducing and enlarging.
        height, width = np.exp(rng.uniform(0, 5.7, 2)).astype(int)
        # Black and white overshoots: the clipping at 0 and 255 matters.
        _check(_noise(case, height, width, black_and_white=case % 2), to, interpolation)


@pytest.mark.parametrize("shape", [(20_000, 3), (3, 20_000), (2_500, 1_900), (32, 229), (48, 240)])
def test_extreme_sides_and_whole_ratios(shape):
    """Ratios such as 224/32 put pixels on the very end of a kernel, where it is 0."""
    _check(_noise(0, *shape), (224, 224))


# The last size but one whose passes Pillow 13 keeps in the old order, and the first that it turns.
@pytest.mark.parametrize("height", [50 + 2 * 25, 50 + 2 * 25 + 1])
def test_order_of_the_passes_at_pillows_threshold(height):
    _check(_noise(height, height, 75, black_and_white=True), (50, 50))


def test_window_is_the_part_of_the_whole():
    image = _noise(1, 83, 131)
    want = np.asarray(Image.fromarray(image).resize((70, 51), Image.Resampling.BICUBIC))
    got = resize(tf.constant(image), (51, 70), interpolation="bicubic", window=(7, 13, 33, 41))
    np.testing.assert_array_equal(got, want[7 : 7 + 33, 13 : 13 + 41])
