"""Lines for whoever watches a run: a terminal that is gone, or a full disk, must not end it."""

import contextlib
import os
import sys
from typing import TextIO


def say(text: str, *, on: bool = True) -> None:
    """Prints a line to stdout at once, so that it is seen when the output is piped."""
    if on:
        _print(text, sys.stdout)


def complain(text: str) -> None:
    """`say` to stderr."""
    _print(text, sys.stderr)


def _print(text: str, stream: TextIO) -> None:
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:  # nobody will read this any more
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except OSError:  # no room, or no terminal
        pass
