"""Decodes image files to uint8 pixels, as PIL does."""

from collections.abc import Callable

import tensorflow as tf

from deit_jax.data.pillow.resize import cut


def decode(data: tf.Tensor) -> tf.Tensor:
    """Decodes a whole JPEG, PNG, BMP or GIF (its first frame).

    Pixels are those of the reference, `PIL.Image.open(file).convert("RGB")`, for palettes, grey,
    CMYK, 16 bits and transparency too, except that
      - of a grey PNG of 16 bits the upper eight count; Pillow turns nearly all of it white,
      - transparent pixels of a GIF are black; the reference's folders hold no GIFs.

    Args:
      data: the bytes of a file (scalar string), or pixels, which are returned as they are.

    Returns:
      uint8 [h, w, 3].

    Raises:
      tf.errors.OpError: damaged data, also a PNG that lacks nothing but its end, which Pillow
        forgives; a BMP of 1, 4 or 16 bits.
    """
    if data.dtype != tf.string:
        return data

    def decode_jpeg() -> tf.Tensor:
        # TensorFlow's default DCT is faster and up to 24 levels off; this one is Pillow's.
        return tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE")

    return tf.cond(tf.io.is_jpeg(data), decode_jpeg, lambda: _decode_other(data))


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
    lazily = tf.io.is_jpeg(data) & tf.logical_not(whole)
    image = tf.cond(lazily, lambda: tf.zeros((0, 0, 3), tf.uint8), lambda: decode(data))
    shape = tf.cond(lazily, lambda: tf.io.extract_jpeg_shape(data), lambda: tf.shape(image))

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


def _decode_other(data: tf.Tensor) -> tf.Tensor:
    """Decodes the bytes of a PNG, BMP or GIF to uint8 [h, w, 3]."""
    image = tf.io.decode_image(data, channels=3, expand_animations=False)
    image = tf.ensure_shape(image, (None, None, 3))
    # After decoding, whose error says better than substr's what is wrong with too few bytes.
    with tf.control_dependencies([image]):
        kind_and_bits = tf.strings.substr(data, 0, 2) + tf.strings.substr(data, 28, 2)
    return tf.cond(kind_and_bits == b"BM\x08\x00", lambda: _bmp_colours(image, data), lambda: image)


def _bmp_colours(image: tf.Tensor, data: tf.Tensor) -> tf.Tensor:
    """Looks the pixels of a BMP of 8 bits up in its palette; TensorFlow takes them for grey."""
    pixels, header = (
        tf.io.decode_raw(tf.strings.substr(data, offset, 4), tf.int32)[0] for offset in (10, 14)
    )
    palette = tf.strings.substr(data, 14 + header, pixels - 14 - header)
    blue_green_red_0 = tf.reshape(tf.io.decode_raw(palette, tf.uint8), (-1, 4))
    return tf.gather(blue_green_red_0[:, 2::-1], tf.cast(image[:, :, 0], tf.int32))
