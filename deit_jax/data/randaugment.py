"""RandAugment as timm does it on PIL images, stateless and in TensorFlow operations.

`draw` makes all random choices, as a pure function of the seed; `apply` follows them. Only the
operation that was drawn runs.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from deit_jax.config.randaugment_policy import OPERATIONS, Policy
from deit_jax.data.draws import integer, uniform
from deit_jax.data.pillow import geometry, tone
from deit_jax.data.pillow.geometry import Fill


class Draws(NamedTuple):
    """The choices of a policy for one image, each [num_ops], in the order of application."""

    operation: tf.Tensor  # int32, index into OPERATIONS
    applied: tf.Tensor  # bool; False: this operation is skipped
    level: tf.Tensor  # float64 in [0, magnitude_max]
    negative: tf.Tensor  # bool; the sign, where an operation has one


def draw(seed: tf.Tensor, policy: Policy) -> Draws:
    """Makes the random choices for one image from its seed (int64 [2])."""
    seeds = tf.unstack(tf.random.experimental.stateless_split(seed, 4))
    shape = (policy.num_ops,)
    if math.isinf(policy.magnitude_std):
        level = policy.magnitude * uniform(seeds[2], shape)
    else:
        noise = tf.random.stateless_normal(shape, seeds[2], dtype=tf.float64)
        level = policy.magnitude + policy.magnitude_std * noise
    return Draws(
        operation=integer(seeds[0], len(OPERATIONS), shape),
        applied=uniform(seeds[1], shape) < policy.probability,
        level=tf.clip_by_value(level, 0.0, float(policy.magnitude_max)),
        negative=uniform(seeds[3], shape) < 0.5,
    )


def apply(
    image: tf.Tensor, draws: Draws, *, policy: Policy, interpolation: str, fill: Fill
) -> tf.Tensor:
    """Applies the drawn operations in turn.

    Args:
      image: uint8 [S, S, 3] of static shape.
      draws: the choices of `policy`.
      policy: whose `increasing` says how levels become arguments.
      interpolation: "bicubic" or "bilinear", of shear, translation and rotation.
      fill: colour of what these bring in from outside, 0 … 255.

    Returns:
      uint8 [S, S, 3].
    """
    shape, how = image.shape, {"interpolation": interpolation, "fill": fill}
    for operation, applied, level, negative in zip(*map(tf.unstack, draws), strict=True):
        branches = _branches(image, level, negative, policy.increasing, **how)
        image = tf.switch_case(
            tf.where(applied, operation, len(OPERATIONS)),
            [branches[name] for name in OPERATIONS],
            default=lambda unchanged=image: tf.identity(unchanged),
        )
        image = tf.ensure_shape(image, shape)
    return image


def _branches(
    image: tf.Tensor, level: tf.Tensor, negative: tf.Tensor, increasing: bool, **how: str | Fill
) -> dict[str, Callable[[], tf.Tensor]]:
    """Returns every operation at a level, its argument in timm's float64 arithmetic."""
    share = level / 10.0
    size = image.shape[0]

    def signed(strength: float) -> tf.Tensor:
        value = share * strength
        return tf.where(negative, -value, value)

    def whole(strength: float) -> tf.Tensor:
        return tf.cast(share * strength, tf.int32)  # truncates, as int() does

    def bits() -> tf.Tensor:
        kept = 4 - whole(4.0) if increasing else whole(4.0)
        return tf.clip_by_value(kept, 0, 8)

    def threshold() -> tf.Tensor:
        value = tf.minimum(whole(256.0), 256)
        return 256 - value if increasing else value

    def factor() -> tf.Tensor:
        # 1 changes nothing. The list that does not increase goes from 0.1 to 1.9 with the level.
        value = tf.maximum(1.0 + signed(0.9), 0.1) if increasing else share * 1.8 + 0.1
        return tf.cast(value, tf.float32)

    return {
        "AutoContrast": lambda: tone.auto_contrast(image),
        "Equalize": lambda: tone.equalize(image),
        "Invert": lambda: tone.invert(image),
        "Rotate": lambda: geometry.rotate(image, signed(30.0), **how),
        "Posterize": lambda: tone.posterize(image, bits()),
        "Solarize": lambda: tone.solarize(image, threshold()),
        "SolarizeAdd": lambda: tone.solarize_add(image, tf.minimum(whole(110.0), 128)),
        "Color": lambda: tone.color(image, factor()),
        "Contrast": lambda: tone.contrast(image, factor()),
        "Brightness": lambda: tone.brightness(image, factor()),
        "Sharpness": lambda: tone.sharpness(image, factor()),
        "ShearX": lambda: geometry.shear(image, signed(0.3), vertical=False, **how),
        "ShearY": lambda: geometry.shear(image, signed(0.3), vertical=True, **how),
        "TranslateX": lambda: geometry.translate(image, signed(0.45) * size, vertical=False, **how),
        "TranslateY": lambda: geometry.translate(image, signed(0.45) * size, vertical=True, **how),
    }
