"""DeiT III's Simple Random Crop as torchvision does it on PIL images.

Touvron et al., "DeiT III: Revenge of the ViT" (2022): the short side is resized to the crop's, four
pixels on each side are added by reflection, and a square is cut out anywhere. Aspect and most of
the picture survive, which suits pretraining on ImageNet-21k. Only the square is computed.
"""

from collections.abc import Callable

import tensorflow as tf

from deit_jax.data.decode import decode_jpeg_box, decode_other
from deit_jax.data.draws import fold, integer, uniform
from deit_jax.data.pillow.resize import cut, plan_resize, resize
from deit_jax.data.pillow.tone import compiled
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


_TRIES = 10


def random_cut(
    image: tf.Tensor, seed: tf.Tensor, *, scale: tuple[float, float], ratio: tuple[float, float]
) -> tf.Tensor:
    """The box of torchvision's RandomResizedCrop out of a decoded image [h, w, 3], not resized."""
    height, width, _ = tf.unstack(tf.shape(image))
    return cut(image, random_box(height, width, seed, scale=scale, ratio=ratio))


def random_jpeg_cut(
    data: tf.Tensor, seed: tf.Tensor, *, scale: tuple[float, float], ratio: tuple[float, float]
) -> tf.Tensor:
    """`random_cut` of the bytes of a JPEG, of which only the box is decoded."""
    height, width, _ = tf.unstack(tf.io.extract_jpeg_shape(data))
    box = random_box(height, width, seed, scale=scale, ratio=ratio)
    return decode_jpeg_box(data, box, width)


@compiled
def random_box(
    height: tf.Tensor,
    width: tf.Tensor,
    seed: tf.Tensor,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tf.Tensor:
    """Draws the box (top, left, height, width) of RandomResizedCrop, int32 [4].

    The first of ten draws of area and aspect that fits is placed uniformly; if none fits, the box
    is the largest centred one whose aspect is inside `ratio`.
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
    top = tf.where(found, integer(fold(seed, 2), room_y), room_y // 2)
    left = tf.where(found, integer(fold(seed, 3), room_x), room_x // 2)
    return tf.stack([top, left, box_height, box_width])


def pad_and_crop(image: tf.Tensor, seed: tf.Tensor, *, pad: int) -> tf.Tensor:
    """torchvision's RandomCrop(S, padding=pad) of an S×S image: zeros around, then an S×S cut."""
    height, width, _ = tf.unstack(tf.shape(image))
    padded = tf.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    room = tf.constant(2 * pad)
    top, left = integer(fold(seed, 0), room), integer(fold(seed, 1), room)
    return padded[top : top + height, left : left + width]


def resize_whole(image: tf.Tensor, *, size: int, interpolation: str) -> tf.Tensor:
    """Resizes to size × size without keeping the aspect; an image of that size is unchanged."""
    shape = tf.shape(image)
    right_size = (shape[0] == size) & (shape[1] == size)
    image = tf.cond(
        right_size,
        lambda: image,
        lambda: resize(image, (size, size), interpolation=interpolation),
    )
    return tf.ensure_shape(image, (size, size, 3))


def centre_crop(data: tf.Tensor, *, size: int, crop_ratio: float, interpolation: str) -> tf.Tensor:
    """Resizes the short side to int(size / crop_ratio) and cuts out the centre size × size.

    The long side is truncated and the offsets are rounded half to even, as torchvision's Resize and
    CenterCrop do. Only what the crop depends on is computed, and of a JPEG decoded.
    """

    def plan(shape: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        resized, offsets = _resized_and_offsets(shape, size, int(size / crop_ratio))
        window = (offsets[0], offsets[1], size, size)
        return plan_resize(shape, tf.unstack(resized), interpolation=interpolation, window=window)

    def crop_jpeg() -> tf.Tensor:
        shape = tf.io.extract_jpeg_shape(data)
        box, resample = plan(shape)
        return resample(decode_jpeg_box(data, box, shape[1]))

    def crop_decoded() -> tf.Tensor:
        image = decode_other(data) if data.dtype == tf.string else data
        box, resample = plan(tf.shape(image))
        return resample(cut(image, box))

    if data.dtype != tf.string:
        return crop_decoded()
    return tf.cond(tf.io.is_jpeg(data), crop_jpeg, crop_decoded)


@compiled
def _resized_and_offsets(shape: tf.Tensor, size: int, short: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Height and width of an image resized to the short side, and top and left of its centre."""
    sides = tf.cast(shape[:2], tf.float64)
    resized = tf.cast(short * sides / tf.reduce_min(sides), tf.int32)
    return resized, tf.cast(tf.round(tf.cast(resized - size, tf.float64) / 2.0), tf.int32)
