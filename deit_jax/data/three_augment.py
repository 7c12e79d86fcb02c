"""DeiT III's 3-Augment and colour jitter on uint8 [S, S, 3], bit for bit what PIL gives.

Touvron et al., "DeiT III: Revenge of the ViT" (2022): a picture becomes grey, solarised or blurred,
and then its colours are jittered. `draw_*` makes all random choices, as a pure function of the
seed; `apply_*` follows them. Only what was drawn runs.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from deit_jax.data.pillow import tone
from deit_jax.data.pillow.blur import gaussian_blur

THREE = ("grey", "solarise", "blur")
ORDERS = tuple(itertools.permutations(("brightness", "contrast", "saturation")))

_THRESHOLD = 128
_RADIUS = (0.1, 2.0)


class ThreeDraw(NamedTuple):
    """The choices of `three_augment` for one image."""

    operation: tf.Tensor  # int32, index into THREE
    radius: tf.Tensor  # float32 in [0.1, 2), of the blur, in pixels


class JitterDraw(NamedTuple):
    """The choices of `color_jitter` for one image; a factor of 1 changes nothing."""

    order: tf.Tensor  # int32, index into ORDERS
    brightness: tf.Tensor  # float32
    contrast: tf.Tensor  # float32
    saturation: tf.Tensor  # float32


def three_augment(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Makes the image grey, solarises or blurs it, each with probability 1/3.

    Solarising inverts the values from 128 on; the blur's radius is uniform in 0.1 … 2 pixels.

    Args:
      image: uint8 [S, S, 3] of static shape.
      seed: int64 [2], of all choices.

    Returns:
      An image of the same type and shape.
    """
    return apply_three_augment(image, draw_three_augment(seed))


def draw_three_augment(seed: tf.Tensor) -> ThreeDraw:
    """Makes the random choices for one image from its seed (int64 [2])."""
    operation, radius = _uniform(seed, 2)
    low, high = _RADIUS
    return ThreeDraw(
        operation=tf.cast(len(THREE) * operation, tf.int32),
        radius=tf.cast(low + (high - low) * radius, tf.float32),
    )


def apply_three_augment(image: tf.Tensor, draw: ThreeDraw) -> tf.Tensor:
    """Applies the drawn operation to uint8 [S, S, 3] of static shape."""
    branches = {
        "grey": lambda: tone.color(image, tf.constant(0.0)),  # in three channels
        "solarise": lambda: tone.solarize(image, tf.constant(_THRESHOLD)),
        "blur": lambda: gaussian_blur(image, draw.radius),
    }
    result = tf.switch_case(draw.operation, [branches[name] for name in THREE])
    return tf.ensure_shape(result, image.shape)


def color_jitter(image: tf.Tensor, seed: tf.Tensor, strength: float) -> tf.Tensor:
    """torchvision's ColorJitter(strength, strength, strength) on PIL images.

    Args:
      image: uint8 [S, S, 3] of static shape.
      seed: int64 [2], of all choices.
      strength: the factors of brightness, contrast and saturation are uniform in
        max(0, 1 - strength) … 1 + strength; 0 changes nothing.

    Returns:
      An image of the same type and shape.
    """
    return apply_color_jitter(image, draw_color_jitter(seed, strength))


def draw_color_jitter(seed: tf.Tensor, strength: float) -> JitterDraw:
    """Makes the random choices for one image from its seed (int64 [2])."""
    order, *factors = _uniform(seed, 4)
    low, high = max(0.0, 1.0 - strength), 1.0 + strength
    return JitterDraw(
        tf.cast(len(ORDERS) * order, tf.int32),
        *(tf.cast(low + (high - low) * factor, tf.float32) for factor in factors),
    )


def apply_color_jitter(image: tf.Tensor, draw: JitterDraw) -> tf.Tensor:
    """Applies the three blends to uint8 [S, S, 3] of static shape, in the drawn order."""
    blends = {
        "brightness": lambda image: tone.brightness(image, draw.brightness),
        "contrast": lambda image: tone.contrast(image, draw.contrast),
        "saturation": lambda image: tone.color(image, draw.saturation),
    }

    def in_order(names: tuple[str, ...]) -> Callable[[], tf.Tensor]:
        def branch() -> tf.Tensor:
            result = image
            for name in names:
                result = blends[name](result)
            return result

        return branch

    result = tf.switch_case(draw.order, [in_order(names) for names in ORDERS])
    return tf.ensure_shape(result, image.shape)


def _uniform(seed: tf.Tensor, count: int) -> list[tf.Tensor]:
    """Independent float64 scalars, uniform in [0, 1)."""
    return tf.unstack(tf.random.stateless_uniform((count,), seed, dtype=tf.float64))
