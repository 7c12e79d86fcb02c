"""Pillow's Gaussian blur, bit for bit, on uint8 [h, w, 3].

`PIL.ImageFilter.GaussianBlur` is three box blurs along the rows and then three along the columns,
each rounded to uint8. The box has a fractional radius: its outermost pixels count less, by Gwosdek
et al., "Theoretical Foundations of Gaussian Convolution by Extended Box Filtering" (2011), and all
weights have 24 binary places. Beyond the border the outermost pixel is repeated.
"""

import tensorflow as tf

from deit_jax.data.xla import compiled

_PASSES = 3
_FRACTION_BITS = 24
_REACH = 2  # how far the box reaches at most


@compiled
def gaussian_blur(image: tf.Tensor, radius: tf.Tensor) -> tf.Tensor:
    """Blurs an image as `PIL.ImageFilter.GaussianBlur(radius)` does.

    Args:
      image: uint8 [h, w, 3] of static shape, of any size.
      radius: the standard deviation in pixels, a float32 scalar in (0, 2.4].

    Returns:
      uint8 [h, w, 3].
    """
    height, width, channels = image.shape
    weights = _box_weights(radius)
    rows = tf.reshape(image, (height, width * channels))
    rows = _box_blurs(rows, weights, axis=1, step=channels)
    rows = _box_blurs(rows, weights, axis=0, step=1)
    return tf.reshape(rows, image.shape)


def _box_blurs(lines: tf.Tensor, weights: list[tf.Tensor], axis: int, step: int) -> tf.Tensor:
    """Makes all passes over uint8 [n, m]; the next pixel is `step` further along `axis`."""
    # A loop for XLA too: unrolled, each pass would compute the one before anew for every tap.
    (lines,) = tf.while_loop(
        lambda _: True,
        lambda lines: (_box_blur(lines, weights, axis, step),),
        (lines,),
        maximum_iterations=_PASSES,
    )
    return lines


def _box_blur(lines: tf.Tensor, weights: list[tf.Tensor], axis: int, step: int) -> tf.Tensor:
    """Makes one pass; the sums just fit into 32 bits."""
    first, last = (lines[:1], lines[-1:]) if axis == 0 else (lines[:, :step], lines[:, -step:])
    extended = tf.concat([first] * _REACH + [lines] + [last] * _REACH, axis)
    extended = tf.cast(extended, tf.uint32)

    def tap(offset: int) -> tf.Tensor:
        begin = [0, 0]
        begin[axis] = (_REACH + offset) * step
        return tf.slice(extended, begin, lines.shape)

    total = tap(0) * weights[0] + 2 ** (_FRACTION_BITS - 1)
    for offset in range(1, _REACH + 1):
        total += (tap(-offset) + tap(offset)) * weights[offset]
    return tf.cast(tf.bitwise.right_shift(total, _FRACTION_BITS), tf.uint8)


def _box_weights(radius: tf.Tensor) -> list[tf.Tensor]:
    """Returns the weights of the pixels 0, 1 … _REACH from the middle, uint32 in units of 2^-24.

    Pillow computes in float32. Here each operation is one in float64 rounded to float32, which has
    the same bits even where XLA contracts a product and a sum: in float64 these products are exact.
    """

    def single(value: tf.Tensor) -> tf.Tensor:
        return tf.cast(tf.cast(value, tf.float32), tf.float64)

    variance = single(single(tf.cast(radius, tf.float64) ** 2) / _PASSES)
    length = single(tf.sqrt(12.0 * variance + 1.0))
    whole = tf.floor((length - 1.0) / 2.0)
    difference = single(whole * (whole + 1.0) - single(3.0 * variance))
    numerator = single((2.0 * whole + 1.0) * difference)
    denominator = single(6.0 * single(variance - (whole + 1.0) ** 2))
    box_radius = single(whole + single(numerator / denominator))

    one = 2**_FRACTION_BITS
    reach = tf.cast(box_radius, tf.int32)
    inner = tf.cast(single(one / single(2.0 * box_radius + 1.0)), tf.int32)
    outer = (one - (2 * reach + 1) * inner) // 2
    offsets = tf.range(_REACH + 1)
    weights = tf.where(offsets <= reach, inner, tf.where(offsets == reach + 1, outer, 0))
    return tf.unstack(tf.cast(weights, tf.uint32))
