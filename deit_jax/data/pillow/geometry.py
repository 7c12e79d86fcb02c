"""Pillow's affine transforms of RandAugment on uint8 [S, S, 3]: shear, translate, rotate.

A pixel of the result whose centre comes from outside the image has the fill colour. Any other is
interpolated between the 4×4 (bicubic, a = -1) or 2×2 (bilinear) pixels around where its centre
comes from, clamped to the image, and truncated.

Shear and translation move whole rows or columns: one fraction and 4 taps per line. Only rotation
needs 16 taps per pixel. Interpolation sees images as [S, 3S], since a last dimension of 3 made its
loops up to three times slower.
"""

import math
import operator

import numpy as np
import tensorflow as tf

from deit_jax.data.xla import compiled

_EDGE = 2  # how far taps reach over the border
_SHIFTS = (0, 8, 16, 24)  # of four neighbouring values in one int32

Fill = tuple[int, int, int]


def shear(
    image: tf.Tensor, factor: tf.Tensor, *, vertical: bool, interpolation: str, fill: Fill
) -> tf.Tensor:
    """Reads row y at x + factor · (y + 1/2); vertical: column x at y + factor · (x + 1/2)."""
    lines = tf.range(image.shape[0], dtype=tf.float64) + 0.5
    return _shift_lines(image, factor * lines, vertical, interpolation, fill)


def translate(
    image: tf.Tensor, pixels: tf.Tensor, *, vertical: bool, interpolation: str, fill: Fill
) -> tf.Tensor:
    """Reads every pixel `pixels` (float64) to its right; vertical: below it."""
    offsets = tf.fill((image.shape[0],), pixels)
    return _shift_lines(image, offsets, vertical, interpolation, fill)


def rotate(image: tf.Tensor, degrees: tf.Tensor, *, interpolation: str, fill: Fill) -> tf.Tensor:
    """Rotates counter-clockwise around the centre by `degrees` (float64)."""
    # Pillow takes the angle modulo 360 and rounds to 15 digits: right angles are exact. Compiled
    # together with the coordinates, this made half of the pixels of a rotation by 0 a level darker.
    angle = -(degrees % 360.0) * (math.pi / 180.0)
    cosine, sine = (tf.round(f(angle) * 1e15) / 1e15 for f in (tf.cos, tf.sin))
    first, across, down = _sources(cosine, sine, _columns(image))
    taps = _plane_taps(_quadruples(image), first)
    return tf.reshape(_interpolate_planes(taps, across, down, interpolation, fill), image.shape)


def _shift_lines(
    image: tf.Tensor, offsets: tf.Tensor, vertical: bool, interpolation: str, fill: Fill
) -> tf.Tensor:
    """Reads line i (a row; vertical: a column) at its position + offsets[i], float64 [S]."""
    taps = _line_taps(image, offsets, vertical)
    lines = _interpolate_lines(taps, offsets, _columns(image), interpolation, fill)
    lines = tf.reshape(lines, image.shape)
    return _transpose(lines) if vertical else lines


def _columns(image: tf.Tensor) -> tf.Tensor:
    """Returns the column of every value of a row, int32 [3S]: 0, 0, 0, 1, 1, 1, …"""
    # Made outside of the compiled functions: inside, XLA folds them into a float64 constant, and
    # LLVM then computes all types in vectors of 4, which took twice as long.
    return tf.constant(np.repeat(np.arange(image.shape[0], dtype=np.int32), 3))


@compiled
def _line_taps(image: tf.Tensor, offsets: tf.Tensor, vertical: bool) -> tf.Tensor:
    """Returns of line i the pixels from position floor(offsets[i]) - 1 on, uint8 [S, S + 3, 3]."""
    size = image.shape[0]
    first = tf.cast(tf.floor(offsets), tf.int32)[:, None] - 1
    positions = tf.clip_by_value(first + tf.range(size + 3), 0, size - 1)
    lines = tf.range(size)[:, None]
    index = positions * size + lines if vertical else lines * size + positions
    return tf.gather(tf.reshape(image, (-1, 3)), index)


@compiled
def _interpolate_lines(
    taps: tf.Tensor, offsets: tf.Tensor, columns: tf.Tensor, interpolation: str, fill: Fill
) -> tf.Tensor:
    """Returns uint8 [S, 3S], in Pillow's float64 arithmetic."""
    size = taps.shape[0]
    taps = _neighbours(tf.cast(tf.reshape(taps, (size, -1)), tf.int32))
    offsets, positions = offsets[:, None], tf.cast(columns, tf.float64) + 0.5
    # All of a line have the same fraction but for Pillow's rounding, which decides where the result
    # is a whole number and then truncated.
    source = positions + offsets
    fraction = source - positions - tf.floor(offsets)
    inside = (source >= 0) & (source < size)
    return _truncate(_KERNELS[interpolation](taps, fraction), inside, fill)


@compiled
def _transpose(image: tf.Tensor) -> tf.Tensor:
    return tf.transpose(image, (1, 0, 2))


@compiled
def _sources(
    cosine: tf.Tensor, sine: tf.Tensor, columns: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns where the pixels of a rotated image come from.

    That is the index of the first of 4 rows of taps (int32 [S, S]), and of every value the distance
    from the tap in the middle, to the right and down (float32 [S, 3S], in [0, 1); -1 down: from
    outside).
    """
    size = columns.shape[0] // 3
    half = size / 2
    y = (tf.range(size, dtype=tf.float64) + 0.5)[:, None]

    def source(columns: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        x = tf.cast(columns, tf.float64) + 0.5
        across = cosine * x + sine * y + (cosine * -half + sine * -half + half)
        down = -sine * x + cosine * y + (-sine * -half + cosine * -half + half)
        return across, down

    column, row = (tf.floor(c - 0.5) + (_EDGE - 1) for c in source(columns[::3]))
    first = tf.cast(row * (size + 1) + column, tf.int32)
    across, down = source(columns)
    inside = (across >= 0) & (across < size) & (down >= 0) & (down < size)
    across, down = (tf.cast(c - 0.5 - tf.floor(c - 0.5), tf.float32) for c in (across, down))
    return first, across, tf.where(inside, down, -1.0)


@compiled
def _quadruples(image: tf.Tensor) -> tf.Tensor:
    """Returns values packed with their three neighbours to the right, int32 [S + 4, 3(S + 1)].

    Rows and columns begin _EDGE outside of the image, where its outermost pixels are repeated.
    """
    size = image.shape[0]
    image = tf.concat([image[:1]] * _EDGE + [image] + [image[-1:]] * _EDGE, axis=0)
    image = tf.concat([image[:, :1]] * _EDGE + [image] + [image[:, -1:]] * _EDGE, axis=1)
    values = tf.cast(tf.reshape(image, (size + 2 * _EDGE, -1)), tf.int32)
    return sum(map(tf.bitwise.left_shift, _neighbours(values), _SHIFTS))


@compiled
def _plane_taps(quadruples: tf.Tensor, first: tf.Tensor) -> tf.Tensor:
    """Returns four rows of four taps for every value, int32 [4, S, S, 3]."""
    # Indices of pixels from outside may be anything; XLA clamps them.
    rows = (first.shape[0] + 1) * tf.range(4)[:, None, None]
    return tf.gather(tf.reshape(quadruples, (-1, 3)), first + rows)


@compiled
def _interpolate_planes(
    taps: tf.Tensor, across: tf.Tensor, down: tf.Tensor, interpolation: str, fill: Fill
) -> tf.Tensor:
    """Returns uint8 [S, 3S], rarely (a few in a million) a level off Pillow's float64 arithmetic.

    Differences from a tap in the middle are interpolated: where the image is smooth they are small,
    and float32 is enough; where it is flat they are 0.
    """
    rows = tf.unstack(tf.reshape(taps, (4, *across.shape)))
    rows = [[_unpack(row, shift) for shift in _SHIFTS] for row in rows]
    middle = rows[1][1]
    weights = _weights(interpolation, across)
    rows = [_dot(weights, [tap - middle for tap in row]) for row in rows]
    change = _dot(_weights(interpolation, down), rows)
    return _truncate(middle + tf.floor(change), down >= 0, fill)


def _neighbours(values: tf.Tensor) -> list[tf.Tensor]:
    """Returns of [h, 3w] the pixels and those 1, 2 and 3 to their right, each [h, 3(w - 3)]."""
    length = values.shape[1] - 9
    return [values[:, 3 * tap : 3 * tap + length] for tap in range(4)]


def _unpack(packed: tf.Tensor, shift: int) -> tf.Tensor:
    return tf.cast(tf.bitwise.bitwise_and(tf.bitwise.right_shift(packed, shift), 255), tf.float32)


def _weights(interpolation: str, fraction: tf.Tensor) -> list[tf.Tensor]:
    """Returns what the kernel makes of 1 at one of four taps and 0 at the others."""
    return [_KERNELS[interpolation](taps, fraction) for taps in np.eye(4, dtype=np.float32)]


def _dot(weights: list[tf.Tensor], taps: list[tf.Tensor]) -> tf.Tensor:
    return sum(map(operator.mul, weights, taps))


def _truncate(values: tf.Tensor, inside: tf.Tensor, fill: Fill) -> tf.Tensor:
    """Returns values [S, 3S] as uint8 where inside, else the fill colour."""
    result = tf.cast(tf.clip_by_value(values, 0.0, 255.0), tf.uint8)
    return tf.where(inside, result, tf.constant(fill * values.shape[0], tf.uint8))


def _cubic(taps: list[tf.Tensor], fraction: tf.Tensor) -> tf.Tensor:
    """Interpolates by cubic convolution, a = -1, between taps 1 and 2, in Pillow's order."""
    before, left, right, after = taps
    linear = right - before
    square = 2 * (before - left) + right - after
    cube = left - before - right + after
    # Differences of integers are exact, so that flat areas keep their value under truncation.
    left, linear, square, cube = (tf.cast(x, fraction.dtype) for x in (left, linear, square, cube))
    return left + fraction * (linear + fraction * (square + fraction * cube))


def _linear(taps: list[tf.Tensor], fraction: tf.Tensor) -> tf.Tensor:
    _, left, right, _ = taps
    return tf.cast(left, fraction.dtype) + tf.cast(right - left, fraction.dtype) * fraction


_KERNELS = {"bicubic": _cubic, "bilinear": _linear}
