"""Stateless random draws: every seed is an int64 [2], every draw a function of it."""

import tensorflow as tf


def fold(seed: tf.Tensor, number: int) -> tf.Tensor:
    """A new seed that depends on `seed` and `number`."""
    return tf.random.experimental.stateless_fold_in(seed, number)


def uniform(
    seed: tf.Tensor, shape: tuple[int, ...], low: float | tf.Tensor, high: float | tf.Tensor
) -> tf.Tensor:
    """Uniform float64 numbers in [low, high)."""
    return tf.random.stateless_uniform(shape, seed, low, high, dtype=tf.float64)


def integer(seed: tf.Tensor, largest: tf.Tensor) -> tf.Tensor:
    """A uniform int32 in 0 … largest, both included."""
    return tf.random.stateless_uniform((), seed, 0, largest + 1, dtype=tf.int32)
