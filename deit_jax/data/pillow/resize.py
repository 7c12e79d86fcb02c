"""Pillow's antialiased resize, bit for bit, on uint8 [h, w, 3].

Pillow resamples in two passes and rounds to uint8 after each. The taps of an output pixel are a
separable kernel whose support grows with the reduction factor, normalised to sum 1 inside the image
and rounded to 22 fractional bits; the sums are 32-bit integers.

The horizontal pass comes first, except that Pillow 13 begins with the vertical one where that
saves work: where the rows lost exceed 0 and twice the columns lost (measured on 1435 random sizes,
no exception). We follow it. Against earlier versions such tall images differ by a level here and
there; all others are equal.

Both passes combine rows, which is contiguous in memory, and a transposition between them turns the
columns into rows. XLA compiles for each shape it meets, so inputs are padded to one of a few sizes.
Arithmetic on a few numbers is compiled too: operation by operation it would take longer than the
pixels.
"""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from deit_jax.data.xla import compiled

_FRACTION_BITS = 22  # Pillow: 32 bits less 8 for the pixel and 2 for overshoot
_SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}
# Sides that inputs are padded to, about 19 % apart: less padding would cost more compilation.
_SIDES = np.unique(np.ceil(2.0 ** (np.arange(20, 81) / 4) / 16).astype(np.int32) * 16)

Size = tuple[tf.Tensor | int, tf.Tensor | int]
Window = tuple[tf.Tensor | int, tf.Tensor | int, int, int]


def resize(
    image: tf.Tensor, size: Size, *, interpolation: str, window: Window | None = None
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
    box, resample = plan_resize(tf.shape(image), size, interpolation=interpolation, window=window)
    return resample(image if window is None else cut(image, box))


def plan_resize(
    shape: tf.Tensor, size: Size, *, interpolation: str, window: Window | None = None
) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
    """Plans `resize` for an image of the given shape (int32 [3]), of which not all may be needed.

    Returns:
      The box (int32 [4]: top, left, height, width) of the pixels that the window depends on, and
      the function from these pixels to the window.
    """
    top, left, height, width = window or (0, 0, *size)
    whole = (shape[:2], tf.stack(size), tf.stack((top, left)), (height, width), interpolation)
    box, padding, num_taps, vertical_first = _layout(*whole)
    vertical, horizontal = _taps(*whole, box, tf.range(num_taps))

    def resample(image: tf.Tensor) -> tf.Tensor:
        padded = tf.pad(image, padding)
        rows = tf.reshape(padded, (tf.shape(padded)[0], -1))
        rows = tf.cond(
            vertical_first,
            lambda: _transpose(_combine(_transpose(_combine(rows, *vertical)), *horizontal)),
            lambda: _combine(_transpose(_combine(_transpose(rows), *horizontal)), *vertical),
        )
        return tf.reshape(rows, (height, width, 3))

    return box, resample


def cut(image: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
    """Cuts the box (int32 [4]: top, left, height, width) out of an image [h, w, 3]."""
    return tf.slice(
        image, tf.pad(box[:2], ((0, 1),)), tf.pad(box[2:], ((0, 1),), constant_values=3)
    )


@compiled
def _layout(
    shape: tf.Tensor, size: tf.Tensor, start: tf.Tensor, count: tuple[int, int], interpolation: str
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns what it takes to make `count` pixels from `start` on, all (vertical, horizontal).

    That is the box int32 [4] of the pixels needed; the padding int32 [3, 2] that brings them to one
    of _SIDES; the number of taps, enough for both axes; and whether the vertical pass comes first.
    """
    begin, extent, padding, num_taps = [], [], [], []
    reach = int(2 * _SUPPORT[interpolation])
    for axis in range(2):
        outputs = start[axis] + tf.constant([0, count[axis] - 1])
        _, first, end, _ = _footprints(shape[axis], size[axis], outputs, interpolation)
        begin.append(tf.cast(first[0], tf.int32))
        extent.append(tf.cast(end[1] - first[0], tf.int32))
        side = tf.reduce_min(tf.where(extent[-1] <= _SIDES, _SIDES, _SIDES[-1]))
        padding.append(tf.stack([0, side - extent[-1]]))
        # A pixel has 2 · support · scale taps, and the side is at least scale · count.
        num_taps.append((reach * side + count[axis] - 1) // count[axis])
    lost = shape - size
    vertical_first = (lost[0] > 0) & (lost[0] > 2 * lost[1])
    return (
        tf.stack(begin + extent),
        tf.stack([*padding, [0, 0]]),
        tf.maximum(tf.reduce_max(num_taps), reach),
        vertical_first,
    )


@compiled
def _taps(
    shape: tf.Tensor,
    size: tf.Tensor,
    start: tf.Tensor,
    count: tuple[int, int],
    interpolation: str,
    box: tf.Tensor,
    offsets: tf.Tensor,
) -> tuple[tuple[tf.Tensor, tf.Tensor], ...]:
    """Returns for each axis the first input of every output, int32 [n] in the box, and its taps.

    The taps, int32 [n, len(offsets)], are in units of 2^-22; those beyond the last input are 0.
    """
    axes = []
    for axis in range(2):
        outputs = start[axis] + tf.range(count[axis])
        centres, first, end, stretch = _footprints(shape[axis], size[axis], outputs, interpolation)
        positions = first[:, None] + tf.cast(offsets, tf.float64)
        distance = tf.abs((positions - centres[:, None] + 0.5) * (1.0 / stretch))
        weights = tf.where(positions < end[:, None], _KERNELS[interpolation](distance), 0.0)
        weights /= tf.reduce_sum(weights, axis=-1, keepdims=True)
        # Pillow rounds halves away from zero.
        magnitude = tf.floor(tf.abs(weights) * 2.0**_FRACTION_BITS + 0.5)
        taps = tf.cast(tf.sign(weights) * magnitude, tf.int32)
        axes.append((tf.cast(first, tf.int32) - box[axis], taps))
    return tuple(axes)


def _footprints(
    available: tf.Tensor, size: tf.Tensor, outputs: tf.Tensor, interpolation: str
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns centre, first and end of every output's inputs, float64 [n], and the stretch."""
    available = tf.cast(available, tf.float64)
    scale = available / tf.cast(size, tf.float64)
    stretch = tf.maximum(scale, 1.0)
    # A pixel at the end of the support weighs nothing. Just inside, no rounding can decide
    # differently about it in the different places that XLA computes these bounds for.
    support = _SUPPORT[interpolation] * stretch - 1e-9
    centres = (tf.cast(outputs, tf.float64) + 0.5) * scale
    first = tf.maximum(tf.floor(centres - support + 0.5), 0.0)
    end = tf.minimum(tf.floor(centres + support + 0.5), available)
    return centres, first, end, stretch


@compiled
def _combine(rows: tf.Tensor, first: tf.Tensor, taps: tf.Tensor) -> tf.Tensor:
    """Returns as row i the sum of taps[i, k] · row first[i] + k; rows are uint8 [n, 3m]."""
    # Rows, not pixels: over an innermost axis of 3 the sums would not be vectorised.
    bands = tf.gather(rows, first[:, None] + tf.range(tf.shape(taps)[1]))
    sums = tf.reduce_sum(tf.cast(bands, tf.int32) * taps[:, :, None], axis=1)
    rounded = tf.bitwise.right_shift(sums + (1 << (_FRACTION_BITS - 1)), _FRACTION_BITS)
    return tf.cast(tf.clip_by_value(rounded, 0, 255), tf.uint8)


def _transpose(rows: tf.Tensor) -> tf.Tensor:
    """Turns uint8 [n, 3m] into [m, 3n]."""
    count, length = tf.unstack(tf.shape(rows))
    pixels = _transpose_pixels(tf.reshape(rows, (count, length // 3, 3)))
    return tf.reshape(pixels, (length // 3, 3 * count))


@compiled
def _transpose_pixels(image: tf.Tensor) -> tf.Tensor:
    return tf.transpose(image, (1, 0, 2))  # with the reshaping inside it would take twice the time


def _cubic(distance: tf.Tensor) -> tf.Tensor:
    """Returns Keys' cubic, a = -0.5, at non-negative distances, in Pillow's order of operations."""
    near = ((1.5 * distance) - 2.5) * distance * distance + 1.0
    far = (((distance - 5.0) * distance + 8.0) * distance - 4.0) * -0.5
    return tf.where(distance < 1.0, near, tf.where(distance < 2.0, far, 0.0))


def _triangle(distance: tf.Tensor) -> tf.Tensor:
    return tf.maximum(1.0 - distance, 0.0)


_KERNELS = {"bilinear": _triangle, "bicubic": _cubic}
