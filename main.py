"""Trains, evaluates or plans: python main.py --config=configs/NAME.py[:RUN] --workdir=DIR."""

import gc
import signal
from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from deit_jax.checkpoints.training import silence_orbax
from deit_jax.config.flags import config_errors
from deit_jax.errors import InputError, NonFiniteLoss, Preempted, TransientError
from deit_jax.parallel import hosts
from deit_jax.planning import forecast
from deit_jax.training import loop

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Recipe: FILE.py or FILE.py:RUN.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; run again on it to resume.")
_MODES = {"train": loop.train, "eval": loop.evaluate, "plan": forecast.plan}
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    list(_MODES),
    "What to do; plan compiles the training step and says what it needs, and trains nothing.",
)


def main(argv: Sequence[str]) -> None:
    """Runs the chosen mode; mistakes of the user end in one line, not in a traceback."""
    if len(argv) > 1:
        _fail(f"unexpected argument {argv[1]!r}; fields are set as --config.GROUP.FIELD=VALUE")
    try:
        _MODES[_MODE.value](_CONFIG.value, _WORKDIR.value)
    except TransientError as error:
        hosts.let_others_end_it()
        _fail(str(error), status=error.exit_status)
    except (InputError, NonFiniteLoss) as error:
        _fail(str(error))
    except Preempted as error:
        hosts.leave(f"deit-jax: {hosts.label()}{error}", status=error.exit_status)
    except Exception as error:
        hosts.let_others_end_it()
        if isinstance(error, OSError) and error.errno:  # a disk that is full or does not answer
            _fail(" ".join(str(error).split()), status=TransientError.exit_status)
        if not hosts.connected():
            raise
        # Left to itself, Python would wait at its end for the others, which wait for this process.
        hosts.crash(error)
    hosts.leave()


def _interrupted(*_: object) -> None:
    """Ctrl-C: ends at once, where a KeyboardInterrupt would unwind the libraries' own threads."""
    _fail(
        "interrupted; the last checkpoint stays, run the same command to go on",
        status=128 + signal.SIGINT,
    )


def _fail(message: str, *, status: int = 2) -> None:
    """Ends at once: nothing is worth waiting for in the threads of the data readers."""
    said = f"{hosts.label(_distributed())}error: {message}"
    hosts.fail(message, status=status, said=said)


def _distributed() -> ConfigDict | None:
    try:
        return _CONFIG.value.distributed
    except Exception:  # what could not be parsed cannot be asked
        return None


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses flags; ml_collections' traceback for a misspelt field becomes one line."""
    try:
        with config_errors():
            rest = flags.FLAGS(argv)
            flags.FLAGS.validate_all_flags()
            _CONFIG.value.lock()  # locked already: any use raises for a file that is missing
    except InputError as error:
        _fail(str(error))
    return rest


if __name__ == "__main__":
    # Imports and tracing make a million objects that stay; to look through them for garbage after
    # every 700 new ones, as Python does, is a tenth of the start.
    gc.set_threshold(50_000)
    flags.mark_flags_as_required(["config", "workdir"])
    logging.set_verbosity(logging.WARNING)
    silence_orbax()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, _interrupted)
    app.run(main, flags_parser=_parse)
