"""Pillow's antialiased resize, bit for bit, in compiled TensorFlow operations.

Pillow resamples in two passes and rounds to uint8 after each. The taps of an output pixel are a
separable kernel whose support grows with the reduction factor, normalised to sum 1 inside the image
and rounded to 22 fractional bits; the sums are 32-bit integers.

The horizontal pass comes first, except that Pillow 13 begins with the vertical one where that
saves work: where the rows lost exceed 0 and twice the columns lost (measured on 1435 random sizes,
no exception). We follow it. Against earlier versions such tall images differ by a level here and
there; all others are equal.

Both passes combine rows, which is contiguous in memory, and a transposition between them turns the
columns into rows. Each step is an XLA program of its own: fused with its neighbours it would be
computed anew for every use. XLA compiles a program for each shape it meets, so inputs are padded to
one of a few sizes.
"""

import numpy as np
import tensorflow as tf

from deit_jax.data.tone import compiled

_FRACTION_BITS = 22  # Pillow: 32 bits less 8 for the pixel and 2 for overshoot
_SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}
# Sides that inputs are padded to, about 19 % apart: less padding would cost more compilation.
_SIDES = np.unique(np.ceil(2.0 ** (np.arange(20, 81) / 4) / 16).astype(np.int32) * 16)


def resize(
    image: tf.Tensor,
    size: tuple[tf.Tensor | int, tf.Tensor | int],
    *,
    interpolation: str,
    window: tuple[tf.Tensor | int, tf.Tensor | int, int, int] | None = None,
) -> tf.Tensor:
    """Resizes as `PIL.Image.resize(size[::-1], resample)` does, to the bit.

    Args:
      image: uint8 [h, w, 3].
      size: height and width of the whole result.
      interpolation: "bicubic" (a = -0.5) or "bilinear".
      window: (top, left, height, width) of the part of the result to compute; default all of it,
        whose size must then be two Python integers.

    Returns:
      uint8 [height, width, 3] of the window.
    """
    top, left, height, width = window or (0, 0, *size)
    rows, columns, _ = tf.unstack(tf.shape(image))
    vertical, y_begin, y_end, y_pad = _axis(rows, size[0], top, height, interpolation)
    horizontal, x_begin, x_end, x_pad = _axis(columns, size[1], left, width, interpolation)
    image = tf.pad(image[y_begin:y_end, x_begin:x_end], ((0, y_pad), (0, x_pad), (0, 0)))

    lost_rows, lost_columns = rows - size[0], columns - size[1]
    result = tf.cond(
        (lost_rows > 0) & (lost_rows > 2 * lost_columns),
        lambda: _transpose(_combine(_transpose(_combine(image, *vertical)), *horizontal)),
        lambda: _combine(_transpose(_combine(_transpose(image), *horizontal)), *vertical),
    )
    return tf.ensure_shape(result, (height, width, 3))


def _axis(
    available: tf.Tensor,
    size: tf.Tensor | int,
    start: tf.Tensor | int,
    count: int,
    interpolation: str,
) -> tuple[tuple[tf.Tensor, tf.Tensor], tf.Tensor, tf.Tensor, tf.Tensor]:
    """Plans one axis of `available` pixels that becomes `size`, of which `count` from `start` on.

    Returns:
      The arguments of `_combine` for what is cut out and padded, where the cut begins and ends, and
      how much padding brings it to one of _SIDES.
    """
    outputs = start + tf.range(count)
    if count is size:
        begin, end = 0, available
    else:
        begin, end = _span(available, size, outputs, interpolation)
    side = tf.gather(_SIDES, tf.searchsorted(_SIDES, (end - begin)[None])[0])
    # A pixel of the result has 2 · support · scale taps, and the side is at least scale · count.
    reach = int(2 * _SUPPORT[interpolation])
    offsets = tf.range(tf.maximum((reach * side + count - 1) // count, reach))
    taps = _taps(available, size, outputs, begin, offsets, interpolation)
    return taps, begin, end, side - (end - begin)


@compiled
def _span(
    available: tf.Tensor, size: tf.Tensor, outputs: tf.Tensor, interpolation: str
) -> tuple[tf.Tensor, tf.Tensor]:
    """Where the pixels begin and end that the outputs (int32 [n], ascending) depend on."""
    _, first, end, _ = _footprints(available, size, outputs, interpolation)
    return tf.cast(first[0], tf.int32), tf.cast(end[-1], tf.int32)


@compiled
def _taps(
    available: tf.Tensor,
    size: tf.Tensor,
    outputs: tf.Tensor,
    begin: tf.Tensor,
    offsets: tf.Tensor,
    interpolation: str,
) -> tuple[tf.Tensor, tf.Tensor]:
    """The first input of every output, counted from `begin` (int32 [n]), and its taps.

    The taps, int32 [n, len(offsets)], are in units of 2^-22; those beyond the last input are 0.
    """
    centres, first, end, stretch = _footprints(available, size, outputs, interpolation)
    positions = first[:, None] + tf.cast(offsets, tf.float64)
    distance = tf.abs((positions - centres[:, None] + 0.5) * (1.0 / stretch))
    weights = tf.where(positions < end[:, None], _KERNELS[interpolation](distance), 0.0)
    weights /= tf.reduce_sum(weights, axis=-1, keepdims=True)
    magnitude = tf.floor(tf.abs(weights) * 2.0**_FRACTION_BITS + 0.5)  # halves go away from zero
    return tf.cast(first, tf.int32) - begin, tf.cast(tf.sign(weights) * magnitude, tf.int32)


def _footprints(
    available: tf.Tensor, size: tf.Tensor, outputs: tf.Tensor, interpolation: str
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Centre, first and end of the inputs of every output, float64 [n]; stretch of the kernel."""
    available = tf.cast(available, tf.float64)
    scale = available / tf.cast(size, tf.float64)
    stretch = tf.maximum(scale, 1.0)
    support = _SUPPORT[interpolation] * stretch
    centres = (tf.cast(outputs, tf.float64) + 0.5) * scale
    # A pixel at the end of the support weighs nothing. Just inside, no rounding can decide
    # differently about it in the different places that XLA computes these bounds for.
    support -= 1e-9
    first = tf.maximum(tf.floor(centres - support + 0.5), 0.0)
    end = tf.minimum(tf.floor(centres + support + 0.5), available)
    return centres, first, end, stretch


def _combine(image: tf.Tensor, first: tf.Tensor, taps: tf.Tensor) -> tf.Tensor:
    """Row i of the result is the sum of taps[i, k] · row first[i] + k; images uint8 [n, m, 3]."""
    rows, columns, _ = tf.unstack(tf.shape(image))
    # The compiled part sees long rows: over an innermost axis of 3 it would not be vectorised.
    flat = tf.reshape(image, (rows, 3 * columns))
    return tf.reshape(_combine_flat(flat, first, taps), (-1, columns, 3))


@compiled
def _combine_flat(rows: tf.Tensor, first: tf.Tensor, taps: tf.Tensor) -> tf.Tensor:
    bands = tf.gather(rows, first[:, None] + tf.range(tf.shape(taps)[1]))
    sums = tf.reduce_sum(tf.cast(bands, tf.int32) * taps[:, :, None], axis=1)
    rounded = tf.bitwise.right_shift(sums + (1 << (_FRACTION_BITS - 1)), _FRACTION_BITS)
    return tf.cast(tf.clip_by_value(rounded, 0, 255), tf.uint8)


@compiled
def _transpose(image: tf.Tensor) -> tf.Tensor:
    return tf.transpose(image, (1, 0, 2))


def _cubic(distance: tf.Tensor) -> tf.Tensor:
    """Keys' cubic with a = -0.5 at non-negative distances, with Pillow's order of operations."""
    near = ((1.5 * distance) - 2.5) * distance * distance + 1.0
    far = (((distance - 5.0) * distance + 8.0) * distance - 4.0) * -0.5
    return tf.where(distance < 1.0, near, tf.where(distance < 2.0, far, 0.0))


def _triangle(distance: tf.Tensor) -> tf.Tensor:
    return tf.maximum(1.0 - distance, 0.0)


_KERNELS = {"bilinear": _triangle, "bicubic": _cubic}
