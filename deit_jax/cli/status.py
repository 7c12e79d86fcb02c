"""How a command ends: the one place that turns an error into a line and an exit status."""

import os
import sys
from collections.abc import Callable

from deit_jax.console import log, log_error
from deit_jax.errors import InputError, Preempted

INTERRUPTED = 130  # 128 + SIGINT, as a shell has it


def exit_status(command: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit status; an error that is not a bug becomes one line.

    Raises:
      Exception: a bug, for Python to print with its traceback.
    """
    try:
        return command() or 0
    except SystemExit as end:  # of argparse after --help, and of whoever has printed the line
        return end.code or 0
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except BaseException as error:
        status, text = outcome(error)
        if text is None:
            raise
        report(status, text)
        return status


def outcome(
    error: BaseException, *, system: int = InputError.exit_status
) -> tuple[int, str | None]:
    """Returns the exit status that an error stands for, and its line; a bug has None.

    75: stopped and saved, run me again; 2: a mistake of the user, which no retry mends; 1: what a
    retry may fix, and a bug; 130: Ctrl-C.

    Args:
      error: any.
      system: status where the operating system refuses: a full disk, a missing permission.
    """
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, str(error) or "interrupted"
    status = getattr(error, "exit_status", None)  # of this package's own errors
    if status is None and isinstance(error, OSError) and error.errno:
        status = system
    elif status is None and isinstance(error, MemoryError):
        status = InputError.exit_status
    if status is None:
        return 1, None
    return status, " ".join((str(error) or type(error).__name__).split())


def is_expected(error: BaseException) -> bool:
    """Returns whether an error's line says all: one of this package's own, or Ctrl-C."""
    ours = getattr(error, "exit_status", None) is not None
    return ours or isinstance(error, (KeyboardInterrupt, SystemExit))


def report(status: int, text: str, label: str = "") -> None:
    """Prints the last line of a command; `label` names the process, of several."""
    if status == Preempted.exit_status:
        log(f"deit-jax: {label}{text}")
    else:
        log_error(f"{label}error: {text}")
