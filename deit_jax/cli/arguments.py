"""The flags of every command: one spelling, one parser, and mistakes that name the nearest flag."""

import argparse
import math
import os
from collections.abc import Iterable, Iterator
from typing import NoReturn

from deit_jax import storage
from deit_jax.errors import InputError, did_you_mean


class Parser(argparse.ArgumentParser):
    """An argparse parser that takes dashes for underscores and raises InputError for mistakes.

    Its help is `doc`, the docstring of a command: a summary, examples and notes, with empty lines
    between them.
    """

    def __init__(self, doc: str, usage: str | None = None, **options: object):
        summary, _, rest = doc.partition("\n\n")
        examples, _, notes = rest.partition("\n\n")
        super().__init__(
            usage=usage,
            description=summary,
            epilog=f"examples:\n{examples}\n\n{notes}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )

    def parse_args(self, args: list[str], namespace: object = None) -> argparse.Namespace:
        """Parses the flags; raises InputError."""
        arguments, rest = self.parse_known_args(list(self._known(args)), namespace)
        if rest:
            raise InputError(f"unexpected argument {rest[0]!r}; see --help")
        return arguments

    def _known(self, args: list[str]) -> Iterator[str]:
        """The arguments, with every flag as it was defined; an unknown one gets a suggestion."""
        flags = {_underscored(flag): flag for flag in self._option_string_actions}
        only_values = False
        for text in args:
            name, equals, value = text.partition("=")
            only_values = only_values or text == "--"
            if only_values or not name.startswith("--"):
                yield text
            elif _underscored(name) in flags:
                yield flags[_underscored(name)] + equals + value
            else:
                near = did_you_mean(_underscored(name), [x for x in flags if x != "--help"])
                if "--config" in flags:
                    from deit_jax.config.structure import suggest_field

                    near = suggest_field(_underscored(name)[2:], near)
                raise InputError(f"unknown flag {name}{near}; see --help")

    def error(self, message: str) -> NoReturn:
        """Raises InputError."""
        raise InputError(f"{message}; see --help")


def _underscored(flag: str) -> str:
    return flag[:2] + flag[2:].replace("-", "_")


def one_or_more(text: str, most: float = math.inf) -> int:
    """Reads a whole number from 1 to `most`; the `type` of a flag."""
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 to {most}")
    return int(text)


def fraction(text: str) -> float:
    """Reads a number from 0 to 1; the `type` of a flag."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 1")
    return number


def a_path(text: str) -> storage.Path:
    """Reads the path of a file or folder, which may be in a bucket; the `type` of a flag."""
    try:
        return storage.path_of(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def new_file(text: str) -> storage.Path:
    """Reads the path of a file to write; the `type` of a flag.

    A place on a disk that cannot be written shows now, not after minutes of work.
    """
    file = a_path(text)
    if storage.is_remote(file):
        return file
    if file.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file to write")
    if not os.access(file.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: its folder is missing or cannot be written to")
    return file


def check_no_input(flag: str, target: storage.Path, inputs: Iterable[str | os.PathLike]) -> None:
    """Raises InputError where a file to write is one of those that the command reads."""
    if storage.is_remote(target) or not target.exists():
        return
    for name in inputs:
        if os.path.exists(name) and target.samefile(name):
            raise InputError(
                f"{flag} is {target}, which would overwrite the input {name}; name another file"
            )
