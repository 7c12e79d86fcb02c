"""Trains a run, evaluates it, or plans it.

deit-jax train --config=digits_distill --workdir=runs/digits
deit-jax eval --workdir=runs/digits
deit-jax plan --config=deit_b_distill --workdir=runs/deit_b --config.parallel.fsdp=8

A run that exists needs no --config: its own config.json is used. Training on it again goes on where
it stopped. An evaluation in a new folder needs --config and --config.init_from=FOLDER. The plan
compiles the training step for the devices found here and says what memory and time it needs; it
trains and writes nothing.

Status: 0 finished; 75 stopped and saved, run me again; 2 a mistake; 1 what a retry may mend.
"""

import contextlib
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator

from deit_jax.cli.status import INTERRUPTED, outcome, report
from deit_jax.errors import Preempted

RECIPE = "required"  # or that of the run in --workdir
_CTRL_C = "interrupted; the last checkpoint stays, run the same command to go on"


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the flags."""
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run")


def run(arguments: Namespace, emit: Callable[[object], None]) -> None:
    """Trains, evaluates or plans; processes that are connected end together, here.

    Raises:
      SystemExit: with the status of an error whose line has been printed.
    """
    from deit_jax.checkpoints.training import silence_orbax
    from deit_jax.parallel import hosts
    from deit_jax.planning import forecast
    from deit_jax.training import loop

    silence_orbax()
    modes = {"train": loop.train, "eval": loop.evaluate, "plan": forecast.plan}
    try:
        with _ctrl_c():
            result = modes[arguments.command](arguments.config, arguments.workdir)
            if hosts.is_first():
                emit(result)
    except BaseException as error:
        status, text = outcome(error, system=1)  # the disk may have room later
        if hosts.connected():
            _end_together(error, status, text)
        if text is None:
            raise
        report(status, text, hosts.label(arguments.config.distributed))
        sys.exit(status)
    if hosts.connected():
        hosts.leave()


@contextlib.contextmanager
def _ctrl_c() -> Iterator[None]:
    """Says on Ctrl-C what stays. Connected processes end at once: none waits for the others."""
    from deit_jax.parallel import hosts

    def interrupt(*_: object) -> None:
        if hosts.connected():
            hosts.fail(_CTRL_C, status=INTERRUPTED)
        raise KeyboardInterrupt(_CTRL_C)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # whoever started this process ignores Ctrl-C
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end_together(error: BaseException, status: int, text: str | None) -> None:
    """Ends this process and those that wait for it, without Python's own end, which would wait."""
    from deit_jax.parallel import hosts

    if isinstance(error, Preempted):
        hosts.leave(f"deit-jax: {hosts.label()}{text}", status=status)
    if status == 1:  # it may be a failure of another process that this one met
        hosts.let_others_end_it()
    if text is None:
        hosts.crash(error)
    hosts.fail(text, status=status)
