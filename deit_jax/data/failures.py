"""Reads TensorFlow's errors: whether the storage has failed, and the reason in one line.

TensorFlow gives most errors no type of their own, so both depend on its messages.
"""

import errno
import os
import re

import tensorflow as tf

_STORAGE = (
    tf.errors.AbortedError,  # a stale handle of a network file system
    tf.errors.DeadlineExceededError,
    tf.errors.PermissionDeniedError,
    tf.errors.ResourceExhaustedError,  # open files, memory
    tf.errors.UnavailableError,
)


# What TensorFlow raises while it reads: the second where the message has bytes that are not UTF-8.
ERRORS = (tf.errors.OpError, UnicodeDecodeError)


def is_transient(error: tf.errors.OpError | UnicodeDecodeError) -> bool:
    """Returns whether the storage failed, rather than what it holds."""
    # Python code in a pipeline, such as the reader of ArrayRecord files, raises without codes.
    reasons = map(os.strerror, (errno.EIO, errno.ESTALE, errno.EACCES))
    return isinstance(error, _STORAGE) or any(reason in _message(error) for reason in reasons)


def _message(error: tf.errors.OpError | UnicodeDecodeError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return error.object.decode(errors="backslashreplace")
    return error.message


def reason_of(error: tf.errors.OpError | UnicodeDecodeError) -> str:
    """Returns TensorFlow's message in one line, without names of nodes and iterators."""
    text = _message(error).partition("\nTraceback (most recent call last)")[0]  # of Python's code
    text = re.sub(r"Error in user-defined function .*? Iterator::[\w:]+: ", "", text)
    text = re.sub(r"\[\[.*?\]\]|\{\{.*?\}\}|\[Op:.*?\]|name:|InputError:", " ", text)
    return " ".join(text.split())
