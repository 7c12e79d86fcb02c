"""Command lines that take a recipe, `--config=FILE --config.GROUP.FIELD=VALUE`, besides their own.

Whatever is wrong with them is an InputError of one line.
"""

import argparse
import contextlib
from collections.abc import Iterator
from typing import NoReturn

from absl import flags

from deit_jax.errors import InputError


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are InputErrors; `doc` is the docstring of a tool.

    The docstring is a summary line, the examples, and notes, with empty lines between them. It
    shows in `--help` as it is.
    """

    def __init__(self, doc: str, usage: str | None = None):
        summary, _, rest = doc.partition("\n\n")
        examples, _, notes = rest.partition("\n\n")
        super().__init__(
            usage=usage,
            description=summary,
            epilog=f"examples:\n{examples}\n\n{notes}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raises InputError."""
        raise InputError(f"{message}; see --help")


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parses the recipe's flags, and with `parser` all others.

    Returns:
      The arguments, with the recipe as `config` (a locked ConfigDict, overrides applied) and its
      file as `config_file`; both None without `--config`.

    Raises:
      InputError: a flag, a field or the file is wrong.
    """
    from ml_collections import config_flags  # not needed by tools without a recipe

    values = flags.FlagValues()
    with config_errors():
        config_flags.DEFINE_config_file(
            "config", None, flag_values=values, lock_config=True, sys_argv=argv
        )
        _, *rest = values([parser.prog, *argv], known_only=True)
        if values.config is not None:
            values.config.lock()  # locked already: any use raises for a file that is missing
    arguments = parser.parse_args(rest)
    arguments.config = values.config
    arguments.config_file = values["config"].config_filename if values.config else None
    return arguments


@contextlib.contextmanager
def config_errors() -> Iterator[None]:
    """Turns what absl and ml_collections raise for wrong flags and fields into InputErrors."""
    try:
        yield
    except InputError:  # a recipe's own
        raise
    except flags.Error as error:
        raise InputError(_one_line(error)) from error
    except (AttributeError, KeyError) as error:
        cause = error.args[0]
        if isinstance(cause, KeyError):  # the text of a KeyError is its message in quotes
            cause = cause.args[0]
        raise InputError(f"no such config field: {' '.join(str(cause).split())}") from error
    except (TypeError, ValueError) as error:
        message = " ".join(str(error).split())
        raise InputError(f"config field of another type: {message}") from error
    except OSError as error:
        message = str(error).splitlines()[-1].strip()
        raise InputError(f"--config: {message}; recipes live in configs/") from error


def _one_line(error: flags.Error) -> str:
    """What a recipe said when it refused; ml_collections repeats it below a traceback."""
    where, in_recipe, _ = str(error).partition(": Error whilst parsing config file")
    if not in_recipe:
        return " ".join(str(error).split())
    cause = error
    while cause.__context__ is not None:
        cause = cause.__context__
    if isinstance(cause, TypeError) and str(cause).startswith("get_config() takes 0 "):
        return f"{where}: the file has one run only; leave out its last colon and what follows"
    return str(cause) if isinstance(cause, InputError) else f"{where}: {cause}"
