"""DeiT III's 3-Augment and colour jitter on uint8 [S, S, 3], bit for bit what PIL gives.

Touvron et al., "DeiT III: Revenge of the ViT" (2022): a picture becomes grey, solarised or blurred,
and then its colours are jittered. `draw_*` makes all random choices, as a pure function of the
seed; `apply_*` follows them. Only what was drawn runs.
"""

import functools
import itertools
from typing import NamedTuple

import tensorflow as tf

from deit_jax.data.draws import uniform
from deit_jax.data.pillow import tone
from deit_jax.data.pillow.blur import gaussian_blur

THREE = ("grey", "solarise", "blur")
ORDERS = tuple(itertools.permutations(("brightness", "contrast", "saturation")))

_THRESHOLD = 128  # solarising inverts the values from here on
_RADIUS = (0.1, 2.0)


class ThreeDraw(NamedTuple):
    """The choices of 3-Augment for one image."""

    operation: tf.Tensor  # int32, index into THREE
    radius: tf.Tensor  # float32 in [0.1, 2), of the blur, in pixels


class JitterDraw(NamedTuple):
    """The choices of the colour jitter for one image; a factor of 1 changes nothing."""

    order: tf.Tensor  # int32, index into ORDERS
    brightness: tf.Tensor  # float32
    contrast: tf.Tensor  # float32
    saturation: tf.Tensor  # float32


def draw_three(seed: tf.Tensor) -> ThreeDraw:
    """Draws one of the three with equal probability, and the radius, from a seed (int64 [2])."""
    operation, radius = tf.unstack(uniform(seed, (2,)))
    return ThreeDraw(tf.cast(len(THREE) * operation, tf.int32), _between(*_RADIUS, radius))


def apply_three(image: tf.Tensor, draw: ThreeDraw) -> tf.Tensor:
    """Makes uint8 [S, S, 3] of static shape grey, or solarises or blurs it, as drawn."""
    branches = {
        "grey": lambda: tone.color(image, tf.constant(0.0)),  # in three channels
        "solarise": lambda: tone.solarize(image, tf.constant(_THRESHOLD)),
        "blur": lambda: gaussian_blur(image, draw.radius),
    }
    result = tf.switch_case(draw.operation, [branches[name] for name in THREE])
    return tf.ensure_shape(result, image.shape)


def draw_jitter(seed: tf.Tensor, strength: float) -> JitterDraw:
    """Draws the choices of torchvision's ColorJitter(strength, strength, strength).

    Args:
      seed: int64 [2].
      strength: factors are uniform in max(0, 1 - strength) … 1 + strength; 0 changes nothing.
    """
    order, *factors = tf.unstack(uniform(seed, (4,)))
    low, high = max(0.0, 1.0 - strength), 1.0 + strength
    factors = (_between(low, high, factor) for factor in factors)
    return JitterDraw(tf.cast(len(ORDERS) * order, tf.int32), *factors)


def apply_jitter(image: tf.Tensor, draw: JitterDraw) -> tf.Tensor:
    """Changes the colours of uint8 [S, S, 3] of static shape as torchvision does PIL images'."""
    blends = {
        "brightness": lambda image: tone.brightness(image, draw.brightness),
        "contrast": lambda image: tone.contrast(image, draw.contrast),
        "saturation": lambda image: tone.color(image, draw.saturation),
    }

    def blend(names: tuple[str, ...]) -> tf.Tensor:
        return functools.reduce(lambda result, name: blends[name](result), names, image)

    result = tf.switch_case(draw.order, [functools.partial(blend, names) for names in ORDERS])
    return tf.ensure_shape(result, image.shape)


def _between(low: float, high: float, share: tf.Tensor) -> tf.Tensor:
    return tf.cast(low + (high - low) * share, tf.float32)
