"""Compiles small functions of uint8 images with XLA, each into a program of its own.

`tf.function(jit_compile=True)` works inside `tf.data.Dataset.map` on the CPU, and is several times
faster than TensorFlow's kernels, one per arithmetic operation. What has been measured to matter:
  - XLA fuses what stands in one function, and computes anew whatever is used more than once. Steps
    that use each other's results more than once (gathering taps and interpolating) stay apart.
  - XLA compiles once for each shape it meets, and for each Python argument.
  - Indexing with a scalar tensor, x[k], compiles for each value: use `tf.gather`.
  - a * b + c may become one instruction that rounds once.
"""

import functools

import tensorflow as tf

# Without autograph: there is no Python control flow to convert, and tracing is quicker.
compiled = functools.partial(tf.function, jit_compile=True, autograph=False)
