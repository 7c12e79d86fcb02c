"""Reads objects of a bucket, whole or in part, also inside tf.data.

TensorStore does it, in C++ threads: many reads wait at the same time. TensorFlow's own driver knows
no address but Google's, so that no test could reach it.
"""

import errno
import os
import struct

import tensorflow as tf

from deit_jax import storage

_RECORD = struct.Struct("<Q4x")  # a TFRecord starts with its length and the length's checksum


def read(path: str, begin: int | None = None, end: int | None = None) -> bytes:
    """Reads an object, or a range of its bytes.

    Raises:
      FileNotFoundError: there is none.
      OSError: with EIO, whatever else the bucket answers.
    """
    bucket, _, name = path.removeprefix("gs://").partition("/")
    try:
        found = storage.objects(bucket).read(name, byte_range=slice(begin, end)).result()
    except Exception as error:  # TensorStore has no types for its errors
        message = f"{os.strerror(errno.EIO)}: {' '.join(str(error).split())}"
        raise OSError(errno.EIO, message, path) from error
    if found.state != "value":
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    return found.value


def read_file(path: tf.Tensor) -> tf.Tensor:
    """`read` of a whole object, as tf.io.read_file."""
    data = tf.numpy_function(lambda path: read(path.decode()), [path], tf.string, stateful=False)
    return tf.ensure_shape(data, ())


def read_record(path: str, begin: int, end: int) -> bytes:
    """Reads the content of the TFRecord between two offsets and verifies its checksum.

    Raises:
      ValueError: the record is damaged.
      OSError: as `read`.
    """
    import google_crc32c

    record = read(path, begin, end)
    data, (stored,) = record[_RECORD.size : -4], struct.unpack("<I", record[-4:])
    crc = google_crc32c.value(data)
    if ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF != stored:
        raise ValueError(f"corrupted record at {begin} of {path}")
    return data
