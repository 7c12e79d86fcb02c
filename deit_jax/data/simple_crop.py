"""DeiT III's Simple Random Crop as torchvision does it on PIL images.

Touvron et al., "DeiT III: Revenge of the ViT" (2022): the short side is resized to the crop's, four
pixels on each side are added by reflection, and a square is cut out anywhere. Aspect and most of
the picture survive, which suits pretraining on ImageNet-21k. Only the square is computed.
"""

import tensorflow as tf

from deit_jax.data.resize import resize
from deit_jax.data.tone import compiled
from deit_jax.errors import InputError


def simple_random_crop(
    image: tf.Tensor, seed: tf.Tensor, *, size: int, interpolation: str, pad: int = 4
) -> tf.Tensor:
    """torchvision's Resize(size) and RandomCrop(size, padding=pad, padding_mode="reflect").

    Args:
      image: uint8 [h, w, 3] of any size and aspect; a small one is enlarged.
      seed: int64 [2], of the place of the crop.
      size: side of the crop, in pixels.
      interpolation: "bicubic" or "bilinear".
      pad: width of the reflected border, in pixels.

    Returns:
      uint8 [size, size, 3].

    Raises:
      InputError: the crop is no larger than the border, which could not be reflected.
    """
    offset = draw_offset(seed, tf.shape(image)[:2], size=size, pad=pad)
    return crop_at(image, offset, size=size, interpolation=interpolation, pad=pad)


def draw_offset(seed: tf.Tensor, shape: tf.Tensor, *, size: int, pad: int) -> tf.Tensor:
    """Draws the top and left of the crop, int32 [2], in the resized image with its border.

    `shape` is the height and width of the original, int32 [2]. All places are equally likely.
    """
    places = _resized(shape, size) + 2 * pad - size + 1
    uniform = tf.random.stateless_uniform((2,), seed, dtype=tf.float64)
    return tf.cast(uniform * tf.cast(places, tf.float64), tf.int32)


def crop_at(
    image: tf.Tensor, offset: tf.Tensor, *, size: int, interpolation: str, pad: int
) -> tf.Tensor:
    """Cuts the crop at `offset` (see `draw_offset`); arguments as `simple_random_crop`."""
    if size <= pad:
        raise InputError(
            f"config.input.image_size is {size} and config.input.pad {pad}, expected a smaller "
            "pad, since the border is a reflection of the image"
        )
    shape = _resized(tf.shape(image)[:2], size)
    # What is reflected lies inside the crop's own window: extending that gives the same pixels.
    corner = tf.clip_by_value(offset - pad, 0, shape - size)
    height, width = tf.unstack(shape)
    top, left = tf.unstack(corner)
    window = resize(
        image, (height, width), interpolation=interpolation, window=(top, left, size, size)
    )
    extended = _reflect(tf.ensure_shape(window, (size, size, 3)), pad)
    down, right = tf.unstack(offset - corner)
    return tf.slice(extended, (down, right, 0), (size, size, 3))


def _resized(shape: tf.Tensor, size: int) -> tf.Tensor:
    """Height and width once the short side is `size`, int32 [2]; the long side is truncated."""
    return size * shape // tf.reduce_min(shape)


@compiled
def _reflect(image: tf.Tensor, pad: int) -> tf.Tensor:
    # Compiled, this takes a thirtieth of the time of TensorFlow's kernel.
    return tf.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="REFLECT")
