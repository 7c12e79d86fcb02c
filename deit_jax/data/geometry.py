"""Pillow's affine transforms of RandAugment on uint8 [S, S, 3]: shear, translate, rotate.

A pixel of the result whose centre comes from outside the image has the fill colour. Any other is
interpolated between the 4×4 (bicubic, a = -1) or 2×2 (bilinear) pixels around where its centre
comes from, clamped to the image, and truncated. Arithmetic is Pillow's, in float64.

Shear and translation move whole rows or columns: one fraction and 4 taps per line. Only rotation
needs 16 taps per pixel. Pixels travel packed in one int32, so that a tap is one load instead of
three. Packing, gathering and interpolating are XLA programs of their own: in one, XLA would gather
anew for every use of a tap, which takes longer.
"""

import math

import tensorflow as tf

from deit_jax.data.tone import compiled

_EDGE = 2  # how far taps reach over the border
_SHIFTS = (0, 8, 16)  # of red, green and blue in a packed pixel

Fill = tuple[int, int, int]


def shear(
    image: tf.Tensor, factor: tf.Tensor, *, vertical: bool, interpolation: str, fill: Fill
) -> tf.Tensor:
    """Row y is read at x + factor · (y + 1/2); vertical: column x at y + factor · (x + 1/2)."""
    lines = tf.range(image.shape[0], dtype=tf.float64) + 0.5
    return _shift_lines(image, factor * lines, vertical, interpolation, fill)


def translate(
    image: tf.Tensor, pixels: tf.Tensor, *, vertical: bool, interpolation: str, fill: Fill
) -> tf.Tensor:
    """Every pixel is read `pixels` (float64) to its right; vertical: below it."""
    offsets = tf.fill((image.shape[0],), pixels)
    return _shift_lines(image, offsets, vertical, interpolation, fill)


def rotate(image: tf.Tensor, degrees: tf.Tensor, *, interpolation: str, fill: Fill) -> tf.Tensor:
    """Rotates counter-clockwise around the centre by `degrees` (float64)."""
    # Pillow takes the angle modulo 360 and rounds to 15 digits: right angles are exact. Compiled
    # together with the coordinates, this made half of the pixels of a rotation by 0 a level darker.
    angle = -(degrees % 360.0) * (math.pi / 180.0)
    cosine, sine = (tf.round(f(angle) * 1e15) / 1e15 for f in (tf.cos, tf.sin))
    first, across, down = _sources(cosine, sine, image.shape[0])
    return _interpolate_planes(_pack(image), first, across, down, interpolation, fill)


def _shift_lines(
    image: tf.Tensor, offsets: tf.Tensor, vertical: bool, interpolation: str, fill: Fill
) -> tf.Tensor:
    """Reads line i (a row; vertical: a column) at its position + offsets[i], float64 [S]."""
    taps = _line_taps(_pack(image), offsets, vertical)
    return _interpolate_lines(taps, offsets, vertical, interpolation, fill)


@compiled
def _pack(image: tf.Tensor) -> tf.Tensor:
    """Packed pixels with _EDGE repeated ones on every side, int32 [S + 2·_EDGE, S + 2·_EDGE]."""
    weights = tf.bitwise.left_shift(1, tf.constant(_SHIFTS))
    packed = tf.reduce_sum(tf.cast(image, tf.int32) * weights, axis=-1)
    packed = tf.concat([packed[:1]] * _EDGE + [packed] + [packed[-1:]] * _EDGE, axis=0)
    return tf.concat([packed[:, :1]] * _EDGE + [packed] + [packed[:, -1:]] * _EDGE, axis=1)


@compiled
def _line_taps(packed: tf.Tensor, offsets: tf.Tensor, vertical: bool) -> tf.Tensor:
    """int32 [S, S + 3]: of line i the pixels from position floor(offsets[i]) - 1 on."""
    width = packed.shape[0]
    size = width - 2 * _EDGE
    first = tf.cast(tf.floor(offsets), tf.int32)[:, None] - 1
    positions = tf.clip_by_value(first + tf.range(size + 3), 0, size - 1) + _EDGE
    lines = tf.range(size)[:, None] + _EDGE
    index = positions * width + lines if vertical else lines * width + positions
    return tf.gather(tf.reshape(packed, (-1,)), index)


@compiled
def _interpolate_lines(
    taps: tf.Tensor, offsets: tf.Tensor, vertical: bool, interpolation: str, fill: Fill
) -> tf.Tensor:
    size = taps.shape[0]
    kernel = _KERNELS[interpolation]
    # All of a line have the same fraction but for Pillow's rounding, which decides where the result
    # is a whole number and then truncated.
    positions = tf.range(size, dtype=tf.float64)
    source = positions + 0.5 + offsets[:, None]
    inside = (source >= 0) & (source < size)
    fraction = source - 0.5 - (positions + tf.floor(offsets)[:, None])
    planes = []
    for shift, colour in zip(_SHIFTS, fill, strict=True):
        values = _plane(taps, shift)
        result = kernel([values[:, tap : tap + size] for tap in range(4)], fraction)
        planes.append(tf.where(inside, _truncate(result), tf.constant(colour, tf.uint8)))
    result = tf.stack(planes, axis=-1)
    return tf.transpose(result, (1, 0, 2)) if vertical else result


@compiled
def _sources(
    cosine: tf.Tensor, sine: tf.Tensor, size: int
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Where the pixels of a rotated image come from, each [S, S].

    Returns:
      The index into the flat packed pixels of the first of 4×4 taps (int32, -1: from outside), and
      the distances, right and down, from the tap in the middle (float64 in [0, 1)).
    """
    half = size / 2
    centres = tf.range(size, dtype=tf.float64) + 0.5
    x, y = centres, centres[:, None]
    source_x = cosine * x + sine * y + (cosine * -half + sine * -half + half)
    source_y = -sine * x + cosine * y + (-sine * -half + cosine * -half + half)
    inside = (source_x >= 0) & (source_x < size) & (source_y >= 0) & (source_y < size)
    column, row = tf.floor(source_x - 0.5), tf.floor(source_y - 0.5)
    first = tf.cast(row, tf.int32) * (size + 2 * _EDGE) + tf.cast(column, tf.int32)
    first += (_EDGE - 1) * (size + 2 * _EDGE + 1)
    return tf.where(inside, first, -1), source_x - 0.5 - column, source_y - 0.5 - row


@compiled
def _interpolate_planes(
    packed: tf.Tensor,
    first: tf.Tensor,
    across: tf.Tensor,
    down: tf.Tensor,
    interpolation: str,
    fill: Fill,
) -> tf.Tensor:
    kernel = _KERNELS[interpolation]
    width = packed.shape[0]
    flat = tf.reshape(packed, (-1,))
    inside, first = first >= 0, tf.maximum(first, 0)
    taps = [[tf.gather(flat, first + row * width + tap) for tap in range(4)] for row in range(4)]
    planes = []
    for shift, colour in zip(_SHIFTS, fill, strict=True):
        rows = [kernel([_plane(tap, shift) for tap in row], across) for row in taps]
        result = _truncate(kernel(rows, down))
        planes.append(tf.where(inside, result, tf.constant(colour, tf.uint8)))
    return tf.stack(planes, axis=-1)


def _plane(packed: tf.Tensor, shift: int) -> tf.Tensor:
    return tf.cast(tf.bitwise.bitwise_and(tf.bitwise.right_shift(packed, shift), 255), tf.float64)


def _truncate(values: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.clip_by_value(values, 0.0, 255.0), tf.uint8)


def _cubic(taps: list[tf.Tensor], fraction: tf.Tensor) -> tf.Tensor:
    """Cubic convolution with a = -1 between taps 1 and 2, in Pillow's order of operations."""
    before, left, right, after = taps
    linear = right - before
    square = 2.0 * (before - left) + right - after
    cube = left - before - right + after
    # Differences of integers are exact, so that flat areas keep their value under truncation.
    return left + fraction * (linear + fraction * (square + fraction * cube))


def _linear(taps: list[tf.Tensor], fraction: tf.Tensor) -> tf.Tensor:
    _, left, right, _ = taps
    return left + (right - left) * fraction


_KERNELS = {"bicubic": _cubic, "bilinear": _linear}
