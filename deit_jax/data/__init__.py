"""The input pipeline: the only package that imports TensorFlow.

Importing it hides accelerators from TensorFlow, so that JAX has them to itself, gives every
operation of TensorFlow one thread, and quietens its C++ log. A TensorFlow that was already given an
accelerator by the caller cannot be hidden any more and says so.
"""

import os

if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":  # to which importing JAX sets it
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
# oneDNN brings nothing to integer image work and logs a paragraph at every start.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
# Images are processed side by side. Splitting one among threads as well makes none of them faster
# and costs about 20 µs of CPU time per operation.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")

import tensorflow as tf

for _kind in ("GPU", "TPU"):
    tf.config.set_visible_devices([], _kind)

from deit_jax.data.open import open_source  # noqa: E402
from deit_jax.data.plan import InputPlan  # noqa: E402
from deit_jax.data.source import Source  # noqa: E402
from deit_jax.data.stream import eval_batches, example_ids, train_batches  # noqa: E402

__all__ = ["InputPlan", "Source", "eval_batches", "example_ids", "open_source", "train_batches"]
