"""Stateless random draws: every seed is an int64 [2], every draw a pure function of it."""

import tensorflow as tf


def fold(seed: tf.Tensor, number: int) -> tf.Tensor:
    """Returns a new seed that depends on `seed` and `number`."""
    return tf.random.experimental.stateless_fold_in(seed, number)


def uniform(
    seed: tf.Tensor,
    shape: tuple[int, ...] = (),
    low: float | tf.Tensor = 0.0,
    high: float | tf.Tensor = 1.0,
) -> tf.Tensor:
    """Draws uniform float64 numbers in [low, high)."""
    return tf.random.stateless_uniform(shape, seed, low, high, dtype=tf.float64)


def integer(seed: tf.Tensor, end: int | tf.Tensor, shape: tuple[int, ...] = ()) -> tf.Tensor:
    """Draws uniform int32 numbers in 0 … end - 1."""
    return tf.random.stateless_uniform(shape, seed, 0, end, dtype=tf.int32)
