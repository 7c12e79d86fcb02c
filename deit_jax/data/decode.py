"""Decodes image files to uint8 pixels, as PIL does.

TensorFlow's kernels decode what they decode to the reference's pixels, and Pillow all the rest, by
the function that prediction uses too.
"""

import io
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from PIL import Image

from deit_jax import pictures
from deit_jax.data.pillow.resize import cut

_MOST_PIXELS = 2**29 // 3  # Pillow takes images of more for an attack
_PNG_BITS = 24  # offset of the number of bits per channel
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # whose length and checksum Pillow does not look at


def decode(data: tf.Tensor) -> tf.Tensor:
    """Decodes a whole image file of any kind in `pictures.KINDS`; of an animation the first frame.

    Pixels and refusals are those of `pictures.read`, except in damaged files. A few kinds of JPEGs
    are then read by Pillow or TensorFlow alone; of a progressive JPEG whose last scans are missing
    some pixels differ by a few levels, since each version of libjpeg smooths it in its own way. A
    PNG without the checksum after its pixels, or without its palette, is read by Pillow alone.

    Args:
      data: the bytes of a file (scalar string), or pixels, which are returned as they are.

    Returns:
      uint8 [h, w, 3].

    Raises:
      tf.errors.OpError: damaged data, or another file that `pictures.read` refuses.
    """
    if data.dtype != tf.string:
        return data

    def decode_jpeg() -> tf.Tensor:
        # TensorFlow's default DCT is faster and up to 24 levels off; this one is Pillow's.
        return tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE")

    return tf.cond(_plain_jpeg(data)[0], decode_jpeg, lambda: _decode_other(data))


def open_image(
    data: tf.Tensor, *, whole: bool | tf.Tensor = False
) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
    """Opens an image of which boxes are needed: a JPEG is decoded box by box, others at once.

    Args:
      data: the bytes of a file (scalar string), or pixels (uint8 [h, w, 3]).
      whole: whether to decode a JPEG at once, too.

    Returns:
      Its shape, int32 [3], and the function from a box (int32 [4]: top, left, height, width) to its
      pixels, uint8 [height, width, 3].
    """
    if data.dtype != tf.string or whole is True:
        image = decode(data)
        return tf.shape(image), lambda box: cut(image, box)
    plain, shape = _plain_jpeg(data)
    lazily = plain & tf.logical_not(whole)
    image = tf.cond(lazily, lambda: tf.zeros((0, 0, 3), tf.uint8), lambda: decode(data))
    shape = tf.cond(lazily, lambda: shape, lambda: tf.shape(image))

    def cut_out(box: tf.Tensor) -> tf.Tensor:
        return tf.cond(
            lazily, lambda: decode_jpeg_box(data, box, shape[1]), lambda: cut(image, box)
        )

    return shape, cut_out


def decode_jpeg_box(data: tf.Tensor, box: tf.Tensor, image_width: tf.Tensor) -> tf.Tensor:
    """Decodes a box (int32 [4]) of a JPEG, as if cut out of the whole.

    Chroma is interpolated from the neighbouring columns, which libjpeg does not have at the edge of
    what it decodes; one more column on either side makes the box exact.
    """
    top, left, height, width = tf.unstack(box)
    begin = tf.maximum(left - 1, 0)
    end = tf.minimum(left + width + 1, image_width)
    image = tf.io.decode_and_crop_jpeg(
        data, (top, begin, height, end - begin), channels=3, dct_method="INTEGER_ACCURATE"
    )
    return image[:, left - begin : left - begin + width]


def _plain_jpeg(data: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns whether TensorFlow decodes this JPEG as Pillow, and the shape of a JPEG, int32 [3].

    It does unless the JPEG is CMYK or too large.
    """
    is_jpeg = tf.io.is_jpeg(data)
    shape = tf.cond(is_jpeg, lambda: tf.io.extract_jpeg_shape(data), lambda: tf.zeros(3, tf.int32))
    pixels = tf.cast(shape[0], tf.int64) * tf.cast(shape[1], tf.int64)
    return is_jpeg & (shape[2] < 4) & (pixels <= _MOST_PIXELS), shape


# A graph, since eagerly Python's function would get an array of objects, and raise past TensorFlow.
@tf.function(autograph=False, input_signature=[tf.TensorSpec((), tf.string)])
def _decode_other(data: tf.Tensor) -> tf.Tensor:
    """Decodes a plain PNG by TensorFlow's kernel, and other kinds by Pillow."""
    image = tf.ensure_shape(tf.numpy_function(_read, [data], tf.uint8), (None, None, 3))
    return tf.cond(tf.size(image) > 0, lambda: image, lambda: tf.io.decode_png(data, channels=3))


def _read(data: bytes) -> np.ndarray:
    """Returns the pixels of an image file, or none where TensorFlow decodes it to the same."""
    if _is_plain_png(data):
        return np.zeros((0, 0, 3), np.uint8)
    return np.asarray(pictures.read(io.BytesIO(data)))


def _is_plain_png(data: bytes) -> bool:
    """Returns whether this is an intact PNG of one picture and eight bits."""
    if pictures.kind(data[: pictures.FIRST_BYTES]) != "PNG":
        return False
    try:
        file = io.BytesIO(data)
        with Image.open(file, formats=["PNG"]) as image:
            if data[_PNG_BITS] != 8:
                return False
            image.verify()
        file.seek(-8, io.SEEK_CUR)  # before the last chunk's length and name
        return file.read(len(_PNG_END)) == _PNG_END
    except Exception:  # Pillow's reading says what is wrong
        return False
