"""Pillow's colour operations, bit for bit, on uint8 [S, S, 3].

Every function is image → image of the same type and shape; further arguments are scalar tensors.
XLA may contract a * b + c into one instruction that rounds once; where the result is then truncated
this would show, so products are clipped before they are added.
"""

from collections.abc import Callable

import tensorflow as tf

from deit_jax.data.xla import compiled


def auto_contrast(image: tf.Tensor) -> tf.Tensor:
    """Stretches each channel from its smallest … largest value to 0 … 255."""
    low, high = _extremes(image)
    return _look_up(image, _stretch_table(low, high))


def equalize(image: tf.Tensor) -> tf.Tensor:
    """Flattens each channel's histogram; a channel of a single value stays as it is."""
    return _look_up(image, _equal_table(image))


@compiled
def invert(image: tf.Tensor) -> tf.Tensor:
    """Returns 255 - x."""
    return 255 - image


@compiled
def posterize(image: tf.Tensor, bits: tf.Tensor) -> tf.Tensor:
    """Keeps the highest `bits` (int32, 0 … 8) of each value; 0 gives black, as Pillow 8 did."""
    mask = tf.cast(256 - tf.bitwise.left_shift(1, 8 - bits), tf.uint8)
    return tf.bitwise.bitwise_and(image, mask)


@compiled
def solarize(image: tf.Tensor, threshold: tf.Tensor) -> tf.Tensor:
    """Inverts the values of at least `threshold` (int32, 0 … 256)."""
    return tf.where(tf.cast(image, tf.int32) < threshold, image, 255 - image)


@compiled
def solarize_add(image: tf.Tensor, addend: tf.Tensor) -> tf.Tensor:
    """Adds `addend` (int32, 0 … 128) to the values below 128."""
    return image + tf.where(image < 128, tf.cast(addend, tf.uint8), 0)


@compiled
def color(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blends with the grey image; factor (float32) 0 is grey, 1 the image, 2 twice as colourful."""
    return _blend(_grey(image)[:, :, None], image, factor)


@compiled
def contrast(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blends with the mean of the grey image, rounded to an integer."""
    grey = _grey(image)
    mean = tf.reduce_sum(grey) / tf.size(grey)  # float64, as integers divide
    return _blend(tf.cast(mean + 0.5, tf.int32), image, factor)


@compiled
def brightness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blends with black."""
    return _blend(tf.constant(0), image, factor)


def sharpness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blends with a 3×3 mean that counts the middle five times; the outermost pixels stay."""
    return tf.reshape(_sharpen(image, factor), image.shape)


@compiled
def _sharpen(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Returns uint8 [S, 3S]: loops over a last dimension of 3 took twice as long."""
    size, width = image.shape[0], 3 * image.shape[1]
    rows = tf.reshape(image, (size, width))
    padded = tf.concat([rows[:1], rows, rows[-1:]], axis=0)
    padded = tf.concat([padded[:, :3], padded, padded[:, -3:]], axis=1)
    padded = tf.cast(padded, tf.int16)  # the smallest type that holds 13 · 255
    across = padded[:, :-6] + padded[:, 3:-3] + padded[:, 6:]
    total = across[:-2] + across[1:-1] + across[2:] + 4 * padded[1:-1, 3:-3]
    smooth = (total + 6) // 13  # rounds to nearest: no total is halfway
    row, column = tf.range(size)[:, None], tf.range(width)
    inner = (row > 0) & (row < size - 1) & (column >= 3) & (column < width - 3)
    return tf.where(inner, _blend(smooth, rows, factor), rows)


def _blend(other: tf.Tensor, image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Returns other + factor · (image - other) in float32, clipped and truncated."""
    other = tf.cast(other, tf.float32)  # a whole number
    # Clipped before the sum to what clips the sum: rounding keeps the order.
    change = tf.clip_by_value(factor * (tf.cast(image, tf.float32) - other), -other, 255.0 - other)
    return tf.cast(other + change, tf.uint8)


def _grey(image: tf.Tensor) -> tf.Tensor:
    """Returns Pillow's luma, int32 [S, S]."""
    red, green, blue = tf.unstack(tf.cast(image, tf.int32), axis=-1)
    return tf.bitwise.right_shift(19595 * red + 38470 * green + 7471 * blue + 32768, 16)


@compiled
def _extremes(image: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the smallest and the largest value of each channel, uint8 [3]."""

    def reduce(function: Callable[..., tf.Tensor]) -> tf.Tensor:
        # Along columns of values first: over both axes at once it takes eight times as long.
        columns = function(tf.reshape(image, (image.shape[0], -1)), axis=0)
        return function(tf.reshape(columns, (-1, 3)), axis=0)

    return reduce(tf.reduce_min), reduce(tf.reduce_max)


def _stretch_table(low: tf.Tensor, high: tf.Tensor) -> tf.Tensor:
    """Returns uint8 [256, 3]; not compiled: Pillow rounds the product and the sum in float64."""
    values = tf.range(256, dtype=tf.float64)[:, None]
    low, high = tf.cast(low, tf.float64), tf.cast(high, tf.float64)
    scale = 255.0 / tf.maximum(high - low, 1.0)
    stretched = tf.clip_by_value(values * scale + (-low * scale), 0.0, 255.0)
    return tf.cast(tf.where(high > low, stretched, values), tf.uint8)


def _equal_table(image: tf.Tensor) -> tf.Tensor:
    """Returns uint8 [256, 3]."""
    # TensorFlow's kernel: XLA has no quick histogram, and tf.math.bincount first looks for the
    # largest value, which takes longer than the counting.
    counts = tf.raw_ops.Bincount(arr=_bins(image), size=768, weights=tf.zeros((0,), tf.int32))
    return _level_table(tf.reshape(counts, (3, 256)))


@compiled
def _bins(image: tf.Tensor) -> tf.Tensor:
    """Returns 256 · channel + value, int32 [3S²]."""
    return tf.reshape(tf.cast(image, tf.int32) + 256 * tf.range(3), (-1,))


@compiled
def _level_table(counts: tf.Tensor) -> tf.Tensor:
    """Returns Pillow's table, which is not quite the cumulative histogram, uint8 [256, 3]."""
    values = tf.range(256)
    last = tf.reduce_max(tf.where(counts > 0, values, 0), axis=1, keepdims=True)
    step = tf.reduce_sum(tf.where(values < last, counts, 0), axis=1, keepdims=True) // 255
    below = tf.cumsum(counts, axis=1, exclusive=True)
    flat = tf.minimum((step // 2 + below) // tf.maximum(step, 1), 255)
    # A step of 0 means a single value or few other pixels: Pillow leaves the channel as it is.
    return tf.cast(tf.transpose(tf.where(step > 0, flat, values)), tf.uint8)


@compiled
def _look_up(image: tf.Tensor, table: tf.Tensor) -> tf.Tensor:
    """Returns table[x, channel] for every value x; `table` is uint8 [256, 3]."""
    index = 3 * tf.cast(image, tf.int32) + tf.range(3)
    return tf.gather(tf.reshape(table, (-1,)), index)
