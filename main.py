"""Trains, evaluates or plans a run; the same command on its folder again resumes it.

  python main.py --config=configs/digits_distill.py --workdir=runs/digits
  python main.py --config=deit3:l_400 --workdir=DIR --config.dataset.root=ROOT
  python main.py --workdir=runs/digits --mode=eval

--config takes a file (FILE.py, FILE.py:RUN), a recipe that comes with deit-jax (deit_b, deit3:l)
or a run's config.json; without it, the run in --workdir goes on with its own. Fields are set as
--config.GROUP.FIELD=VALUE.
"""

import gc
import signal
import sys
from typing import NoReturn

from absl import logging
from ml_collections import ConfigDict

from deit_jax.checkpoints.training import silence_orbax
from deit_jax.config.flags import Parser, parse
from deit_jax.errors import InputError, NonFiniteLoss, Preempted, TransientError
from deit_jax.parallel import hosts
from deit_jax.planning import forecast
from deit_jax.training import loop

_MODES = {"train": loop.train, "eval": loop.evaluate, "plan": forecast.plan}


def main() -> None:
    """Runs the chosen mode; mistakes of the user end in one line, not in a traceback."""
    parser = Parser(__doc__)
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument(
        "--mode",
        choices=list(_MODES),
        default="train",
        help="plan compiles the training step and says what it needs, and trains nothing",
    )
    try:
        arguments = parse(parser, sys.argv[1:])
    except InputError as error:
        _fail(str(error))
    config = arguments.config
    try:
        _MODES[arguments.mode](config, arguments.workdir)
    except TransientError as error:
        hosts.let_others_end_it()
        _fail(str(error), config, status=error.exit_status)
    except (InputError, NonFiniteLoss) as error:
        _fail(str(error), config)
    except Preempted as error:
        hosts.leave(f"deit-jax: {hosts.label()}{error}", status=error.exit_status)
    except Exception as error:
        hosts.let_others_end_it()
        if isinstance(error, OSError) and error.errno:  # a disk that is full or does not answer
            _fail(" ".join(str(error).split()), config, status=TransientError.exit_status)
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


def _fail(message: str, config: ConfigDict | None = None, *, status: int = 2) -> NoReturn:
    """Ends at once: nothing is worth waiting for in the threads of the data readers."""
    said = f"{hosts.label(config and config.distributed)}error: {message}"
    hosts.fail(message, status=status, said=said)


if __name__ == "__main__":
    # Imports and tracing make a million objects that stay; to look through them for garbage after
    # every 700 new ones, as Python does, is a tenth of the start.
    gc.set_threshold(50_000)
    logging.set_verbosity(logging.WARNING)
    silence_orbax()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, _interrupted)
    main()
