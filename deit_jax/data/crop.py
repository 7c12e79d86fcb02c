"""The crops of training and evaluation, as torchvision cuts them out of PIL images.

DeiT trains on random boxes, DeiT III on simple random crops, small images are padded and cropped;
evaluation crops the centre. Of a resized image only the crop is computed.
"""

import numpy as np
import tensorflow as tf

from deit_jax import pictures
from deit_jax.data.decode import open_image
from deit_jax.data.draws import fold, integer, uniform
from deit_jax.data.pillow.resize import plan_resize, resize
from deit_jax.data.xla import compiled
from deit_jax.errors import InputError

_TRIES = 10


@compiled
def draw_box(
    height: tf.Tensor,
    width: tf.Tensor,
    seed: tf.Tensor,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tf.Tensor:
    """Draws the box (top, left, height, width) of torchvision's RandomResizedCrop, int32 [4].

    The first of ten draws of area and aspect that fits is placed uniformly; if none fits, the box
    is the largest centred one whose aspect is inside `ratio`.

    Args:
      height: of the image, int32.
      width: of the image, int32.
      seed: int64 [2].
      scale: smallest and largest area, as shares of the image's.
      ratio: smallest and largest aspect, width / height.
    """
    tall, wide = tf.cast(height, tf.float64), tf.cast(width, tf.float64)
    area = tall * wide * uniform(fold(seed, 0), (_TRIES,), *scale)
    low, high = (tf.math.log(tf.constant(bound, tf.float64)) for bound in ratio)
    aspect = tf.exp(uniform(fold(seed, 1), (_TRIES,), low, high))
    widths = tf.round(tf.sqrt(area * aspect))
    heights = tf.round(tf.sqrt(area / aspect))
    fits = (widths > 0) & (widths <= wide) & (heights > 0) & (heights <= tall)
    found, first = tf.reduce_any(fits), tf.argmax(tf.cast(fits, tf.int32))

    # At most one of the two minima binds, since ratio[0] <= ratio[1].
    centred_height = tf.minimum(tall, tf.round(wide / ratio[0]))
    centred_width = tf.minimum(wide, tf.round(tall * ratio[1]))
    box_height = tf.cast(tf.where(found, tf.gather(heights, first), centred_height), tf.int32)
    box_width = tf.cast(tf.where(found, tf.gather(widths, first), centred_width), tf.int32)
    room_y, room_x = height - box_height, width - box_width
    top = tf.where(found, integer(fold(seed, 2), room_y + 1), room_y // 2)
    left = tf.where(found, integer(fold(seed, 3), room_x + 1), room_x // 2)
    return tf.stack([top, left, box_height, box_width])


def draw_offset(seed: tf.Tensor, shape: tf.Tensor, *, size: int, pad: int) -> tf.Tensor:
    """Draws the top and left of a simple random crop, int32 [2], in the image with its border.

    `shape` is the height and width before resizing, int32 [2]. All places are equally likely.
    """
    places = _resized(shape, size) + 2 * pad - size + 1
    return tf.cast(uniform(seed, (2,)) * tf.cast(places, tf.float64), tf.int32)


def simple_random_crop(
    image: tf.Tensor, offset: tf.Tensor, *, size: int, interpolation: str, pad: int
) -> tf.Tensor:
    """Crops as torchvision's Resize(size) and RandomCrop(size, pad, padding_mode="reflect") do.

    Touvron et al., "DeiT III: Revenge of the ViT" (2022): the short side is resized to the crop's,
    a border is added by reflection, and a square is cut out anywhere. Aspect and most of the
    picture survive, which suits pretraining on ImageNet-21k.

    Args:
      image: uint8 [h, w, 3] of any size and aspect; a small one is enlarged.
      offset: int32 [2], from `draw_offset`.
      size: side of the crop, in pixels.
      interpolation: "bicubic" or "bilinear".
      pad: width of the border, in pixels.

    Returns:
      uint8 [size, size, 3].

    Raises:
      InputError: the crop is no larger than the border, which could not be reflected.
    """
    if size <= pad:
        raise InputError(
            f"config.input.image_size is {size} and config.input.pad {pad}, expected a smaller "
            "pad, since the border is a reflection of the image"
        )
    shape = _resized(tf.shape(image)[:2], size)
    # What is reflected lies inside the crop's own window: extending that gives the same pixels.
    corner = tf.clip_by_value(offset - pad, 0, shape - size)
    window = (*tf.unstack(corner), size, size)
    window = resize(image, tf.unstack(shape), interpolation=interpolation, window=window)
    down, right = tf.unstack(offset - corner)
    return tf.slice(_reflect(window, pad), (down, right, 0), (size, size, 3))


@compiled
def _reflect(image: tf.Tensor, pad: int) -> tf.Tensor:
    # Compiled, this takes a thirtieth of the time of TensorFlow's kernel.
    return tf.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="REFLECT")


def pad_and_crop(image: tf.Tensor, seed: tf.Tensor, *, pad: int) -> tf.Tensor:
    """Crops uint8 [S, S, 3] as torchvision's RandomCrop(S, pad) does: zeros around, then S×S."""
    padded = tf.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    top, left = (integer(fold(seed, axis), 2 * pad + 1) for axis in range(2))
    return tf.slice(padded, (top, left, 0), tf.shape(image))


def resize_whole(image: tf.Tensor, *, size: int, interpolation: str) -> tf.Tensor:
    """Resizes to size × size without keeping the aspect; an image of that size is unchanged."""
    image = tf.cond(
        tf.reduce_all(tf.shape(image)[:2] == size),
        lambda: image,
        lambda: resize(image, (size, size), interpolation=interpolation),
    )
    return tf.ensure_shape(image, (size, size, 3))


def centre_crop(data: tf.Tensor, *, size: int, crop_ratio: float, interpolation: str) -> tf.Tensor:
    """Crops the centre as torchvision's Resize(int(size / crop_ratio)) and CenterCrop(size) do.

    Args:
      data: the bytes of an image file (scalar string), or pixels (uint8 [h, w, 3]).
      size: side of the crop, in pixels.
      crop_ratio: side of the crop over the short side of the resized image.
      interpolation: "bicubic" or "bilinear".

    Returns:
      uint8 [size, size, 3].
    """

    shape, cut = open_image(data)
    shape = without_lines(shape, int(size / crop_ratio))
    resized, corner = _centre(shape, size, int(size / crop_ratio))
    how = {"interpolation": interpolation, "window": (*tf.unstack(corner), size, size)}
    box, resample = plan_resize(shape, tf.unstack(resized), **how)
    return resample(cut(box))


@tf.function(autograph=False)
def without_lines(shape: tf.Tensor, short: int) -> tf.Tensor:
    """Returns an image's shape (int32 [2] or [3]); raises where prediction refuses the image.

    Only the crop is computed here, which takes no memory, but all must see the same pictures.
    """

    def refuse(shape: np.ndarray) -> np.ndarray:
        pictures.check_resized(int(shape[1]), int(shape[0]), short)
        return shape

    sides = tf.cast(shape[:2], tf.int64)
    long = short * tf.reduce_max(sides) // tf.reduce_min(sides)
    usual = (long <= pictures.USUAL_ASPECT * short) | (long * short <= pictures.MOST_RESIZED)
    checked = tf.cond(usual, lambda: shape, lambda: tf.numpy_function(refuse, [shape], tf.int32))
    return tf.ensure_shape(checked, shape.shape)


@compiled
def _centre(shape: tf.Tensor, size: int, short: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the resized height and width, and top and left of the centre in it, int32 [2]."""
    resized = _resized(shape[:2], short)
    # torchvision rounds halves to even.
    return resized, tf.cast(tf.round(tf.cast(resized - size, tf.float64) / 2.0), tf.int32)


def _resized(shape: tf.Tensor, short: int) -> tf.Tensor:
    """Returns height and width, int32 [2], at this short side; the long side is truncated."""
    return short * shape // tf.reduce_min(shape)
