"""The exceptions that end a command with one line, each with its exit status."""

import difflib
import os
import textwrap
from collections.abc import Iterable

from deit_jax import couplings


class InputError(ValueError):
    """Bad input from outside: a config field, a file, a data set or a checkpoint.

    The message is one line that names the field or file, what was found, what was expected and
    the likely fix. The commands print it without a traceback and exit with a status other than 0.
    """

    exit_status = 2  # no retry mends it


class TransientError(InputError):
    """A transient failure worth retrying: a peer that is not up yet, a disk timeout."""

    exit_status = 1


class Preempted(Exception):
    """A run was told to stop (SIGTERM) and has saved its state; the same command goes on."""

    exit_status = 75  # EX_TEMPFAIL of sysexits.h: run me again


class NonFiniteLoss(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient; the last good state is saved."""

    exit_status = 2  # retrying would fail the same way


def brief(error: BaseException, width: int = 200) -> str:
    """Returns one short line about a library's error, which may write pages."""
    return textwrap.shorten(str(error), width) or type(error).__name__


def is_bug(error: BaseException) -> bool:
    """Returns whether an error comes of a program's own mistake, not of data, disk or network.

    For what catches everything that libraries raise: a bug keeps its traceback.
    """
    bugs = (TypeError, AttributeError, NameError, LookupError, AssertionError, ImportError)
    return isinstance(error, bugs)


def system_reason(error: BaseException) -> str | None:
    """Returns why the system refused to read or write, or None for any other error."""
    number = couplings.system_errno(error)
    return None if number is None else os.strerror(number)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns ", did you mean NAME?" with the most similar name, or "" where none is similar."""
    near = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {near[0]}?" if near else ""
