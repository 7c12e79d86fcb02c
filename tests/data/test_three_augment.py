"""3-Augment and the colour jitter against PIL and torchvision, with the same random choices."""

import functools
import itertools

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageFilter, ImageOps
from scipy import stats

from deit_jax.data import three_augment as ours
from tests.data.conftest import check_stateless, drawn, graph, picture, uncorrelated
from tests.oracles.torchvision_ops import import_torchvision

transforms = import_torchvision().transforms

SIDES = (224, 96, 33)
FACTORS = (0.7, 0.91, 1.0, 1.13, 1.3)


@pytest.fixture(scope="module")
def pictures(photographs):
    """side → uint8 images [side, side, 3]: photographs, then noise, black and white, and black."""
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    made = [noise, (noise > 127).astype(np.uint8) * 255, np.zeros_like(noise)]
    return {
        side: photographs(side, 6) + [np.ascontiguousarray(i[:side, :side]) for i in made]
        for side in SIDES
    }


@functools.cache
def _three(side):
    """(image, name, radius) → image, traced once per side."""
    function = graph(
        lambda image, *draw: ours.apply_three(image, ours.ThreeDraw(*draw)),
        *[(tf.uint8, (side, side, 3)), (tf.int32, ()), (tf.float32, ())],
    )
    return lambda image, name, radius: function(image, ours.THREE.index(name), radius).numpy()


def _pil_three(name, radius):
    """The reference's transform; it always applies."""
    return {
        "grey": transforms.Grayscale(num_output_channels=3),
        "solarise": ImageOps.solarize,
        "blur": lambda image: image.filter(ImageFilter.GaussianBlur(radius=radius)),
    }[name]


@functools.cache
def _jitter(side):
    """(image, order, factors) → image, traced once per side."""
    function = graph(
        lambda image, *draw: ours.apply_jitter(image, ours.JitterDraw(*draw)),
        *[(tf.uint8, (side, side, 3)), (tf.int32, ()), *[(tf.float32, ())] * 3],
    )
    return lambda image, order, factors: function(image, order, *factors).numpy()


def _three_augment(image, seed):
    return ours.apply_three(image, ours.draw_three(seed))


def _color_jitter(image, seed, strength=0.3):
    return ours.apply_jitter(image, ours.draw_jitter(seed, strength))


class _Fixed(transforms.ColorJitter):
    """torchvision's ColorJitter without hue, with choices made by the test."""

    def __init__(self, order, factors):
        super().__init__(0.3, 0.3, 0.3)
        names = ("brightness", "contrast", "saturation")
        self.choices = [names.index(name) for name in ours.ORDERS[order]], *factors, None

    def get_params(self, *ranges):
        return self.choices


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ours.THREE)
def test_each_of_the_three_equals_pil(pictures, side, name):
    rng = np.random.default_rng(side)
    for image in pictures[side]:
        radius = np.float32(rng.uniform(0.1, 2.0))
        want = _pil_three(name, float(radius))(Image.fromarray(image))
        np.testing.assert_array_equal(_three(side)(image, name, radius), want)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("order", range(len(ours.ORDERS)))
def test_jitter_in_every_order_equals_torchvisions(pictures, side, order):
    rng = np.random.default_rng(order)
    for image in pictures[side]:
        factors = rng.choice(FACTORS, 3).astype(np.float32)
        want = _Fixed(order, map(float, factors))(Image.fromarray(image))
        np.testing.assert_array_equal(_jitter(side)(image, order, factors), want)


def test_jitter_equals_torchvisions_at_any_strength(pictures):
    rng = np.random.default_rng(0)
    for number in range(200):
        image = pictures[96][number % 8]
        order, strength = number % 6, (0.3, 1.0, 3.0)[number % 3]
        factors = rng.uniform(max(0, 1 - strength), 1 + strength, 3).astype(np.float32)
        want = _Fixed(order, map(float, factors))(Image.fromarray(image))
        np.testing.assert_array_equal(_jitter(96)(image, order, factors), want)


def test_the_whole_chain_with_our_draws(pictures):
    """The jitter sees what the three left: contrast takes the mean of that."""
    for number in range(60):
        seeds = [tf.constant([number, kind], tf.int64) for kind in range(2)]
        image = pictures[96][number % 8]
        got = _color_jitter(_three_augment(tf.constant(image), seeds[0]), seeds[1], 0.3)
        three = ours.draw_three(seeds[0])
        order, *factors = ours.draw_jitter(seeds[1], 0.3)
        reference = transforms.Compose(
            [
                _pil_three(ours.THREE[int(three.operation)], float(three.radius)),
                _Fixed(int(order), map(float, factors)),
            ]
        )
        np.testing.assert_array_equal(got, reference(Image.fromarray(image)))


def test_the_three_are_equally_likely_and_the_radius_is_uniform():
    operation, radius = drawn(ours.draw_three, 20_000)
    assert stats.chisquare(np.bincount(operation, minlength=3)).pvalue > 1e-3
    assert stats.kstest((radius - 0.1) / 1.9, "uniform").pvalue > 1e-3
    assert uncorrelated([operation, radius])
    assert stats.kstest((radius[operation == 2] - 0.1) / 1.9, "uniform").pvalue > 1e-3


@pytest.mark.parametrize(("strength", "low", "high"), [(0.3, 0.7, 1.3), (1.5, 0.0, 2.5)])
def test_factors_are_uniform_and_orders_equally_likely(strength, low, high):
    order, *factors = drawn(lambda seed: ours.draw_jitter(seed, strength), 20_000)
    assert stats.chisquare(np.bincount(order, minlength=6)).pvalue > 1e-3
    for factor in factors:
        assert stats.kstest((factor - low) / (high - low), "uniform").pvalue > 1e-3
    assert uncorrelated([order, *factors])
    names = ("brightness", "contrast", "saturation")
    assert set(ours.ORDERS) == set(itertools.permutations(names))


def test_no_strength_changes_nothing():
    image = picture(0, 24, 24)
    for number in range(12):
        got = _color_jitter(tf.constant(image), tf.constant([number, 0], tf.int64), 0.0)
        np.testing.assert_array_equal(got, image)


@pytest.mark.parametrize("augment", [_three_augment, _color_jitter])
def test_they_are_functions_of_the_seed(augment):
    image = tf.constant(picture(1, 40, 40))
    check_stateless(lambda seed: augment(image, seed), count=32, distinct=8)
