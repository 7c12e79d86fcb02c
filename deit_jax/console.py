"""Console output that survives a closed terminal or a full disk."""

import atexit
import contextlib
import functools
import os
import re
import sys
import threading
from collections.abc import Iterator
from typing import TextIO

_PATIENCE = 2.0  # seconds
# What a terminal obeys, or takes for another line or another direction; not tab and newline.
_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def escaped(text: str, *, one_line: bool = False) -> str:
    """Returns text whose control characters, of foreign names say, do nothing to a terminal."""
    text = _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return text.replace("\n", "\\n").replace("\t", "\\t") if one_line else text


def log(text: str, *, on: bool = True) -> None:
    """Prints a line to stdout at once, also where the output is piped."""
    if on:
        _print(text, sys.stdout)


def log_error(text: str) -> None:
    """Prints a line to stderr at once."""
    _print(text, sys.stderr)


def _print(text: str, stream: TextIO | None) -> None:
    if stream is None:  # closed before Python started
        return
    try:
        print(escaped(text), file=stream, flush=True)
    except UnicodeEncodeError:  # not to be lost where the terminal knows ASCII alone
        _print(text.encode("ascii", "backslashreplace").decode(), stream)
    except (ValueError, RuntimeError):  # closed since; or a signal's handler within another line
        pass
    except OSError:  # nobody reads it, or there is no room: later there may be
        _discard_at_the_end(stream)


@functools.cache
def _discard_at_the_end(stream: TextIO) -> None:
    """Keeps Python from ending with an error about what it could not print."""

    def discard() -> None:
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    atexit.register(discard)


@contextlib.contextmanager
def doing(what: str, *, on: bool = True) -> Iterator[None]:
    """Logs what is being done where it takes longer than two seconds."""
    timer = threading.Timer(_PATIENCE, log, [f"{what} …"])
    timer.daemon = True
    if on:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
