"""Trains a run, evaluates it, or plans it.

deit-jax train --config=digits_distill --workdir=runs/digits
deit-jax eval --workdir=runs/digits
deit-jax plan --config=deit_b_distill --workdir=runs/deit_b --config.parallel.fsdp=8

A run that exists needs no --config: its own config.json is used. Training on it again goes on where
it stopped. An evaluation in a new folder needs --config and --config.init_from=FOLDER. The plan
compiles the training step for the devices found here and says what memory and time it needs; it
trains and writes nothing.

Status: 0 finished; 75 stopped and saved, run me again; 2 a mistake; 1 what a retry may fix.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator

from deit_jax.cli import crash, startup
from deit_jax.cli.status import INTERRUPTED, is_expected, outcome, report
from deit_jax.console import log_error
from deit_jax.errors import Preempted

_HANDLER_SECONDS = 1  # in which a handler comes, unless the main thread is in compiled code

RECIPE = "required"  # or that of the run in --workdir
_INTERRUPTED = "interrupted; the last checkpoint stays, run the same command to go on"
_STOPPED = "stopped with nothing new to save; run the same command to go on"


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the flags."""
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run")


def run(arguments: Namespace, emit: Callable[[object], None]) -> None:
    """Trains, evaluates or plans; processes that are connected end together, here.

    Raises:
      SystemExit: with the status of an error whose line has been printed.
    """
    with _handlers({signal.SIGTERM: (signal.SIG_DFL, _stop_alone)}):  # while importing
        _run(arguments, emit)


def _run(arguments: Namespace, emit: Callable[[object], None]) -> None:
    from deit_jax.config.flags import check_init_from
    from deit_jax.couplings import silence_orbax
    from deit_jax.parallel import exits, hosts
    from deit_jax.planning import forecast
    from deit_jax.training import loop
    from deit_jax.training.complete import complete

    silence_orbax()
    modes = {"train": loop.train, "eval": loop.evaluate, "plan": forecast.plan}
    try:
        # A mistake is found before the others are waited for.
        config = complete(arguments.config, arguments.workdir)
        if not loop.holds_checkpoint(arguments.workdir):  # else nothing is read from it
            check_init_from(config)
        exits.connect(config.distributed)
        startup.quieten_absent_tpu()
        if note := startup.use_compilation_cache():
            log_error(f"{hosts.label()}note: {note}")
        with _signals_end_at_once():
            result = modes[arguments.command](config, arguments.workdir)
        if hosts.is_first():
            emit(result)
    except BaseException as error:
        status, text = outcome(error, system=1)  # the disk may have room later
        if not is_expected(error) and arguments.command != "plan":  # which writes nothing
            kept = crash.keep(error, arguments.workdir, arguments.command_line, hosts.label())
            if kept is not None:
                log_error(f"{hosts.label()}the traceback is also in {kept}")
        if status == 1:  # it may be a failure of another process that this one met
            exits.let_others_end_it()
        exits.claim_the_end()
        if text is not None:
            report(status, text, hosts.label())
        elif hosts.several():
            log_error("".join(traceback.format_exception(error)))
        else:
            raise
        exits.end(status, text or "it crashed; see its traceback")
        sys.exit(status)
    exits.end(0)


def _stop_alone(*_: object) -> None:
    report(Preempted.exit_status, _STOPPED)
    os._exit(Preempted.exit_status)


@contextlib.contextmanager
def _signals_end_at_once() -> Iterator[None]:
    """Ends on Ctrl-C, and on SIGTERM while a run has nothing to save, without an exception.

    From within TensorFlow or JAX it breaks them: one run in four that was interrupted by
    KeyboardInterrupt aborted with "free(): invalid pointer".
    """
    from deit_jax.parallel import exits, hosts, lease

    def end(number: int, _: object) -> None:
        status, text = INTERRUPTED, _INTERRUPTED
        if number == signal.SIGTERM:
            status, text = Preempted.exit_status, _STOPPED
        exits.claim_the_end()
        report(status, text, hosts.label())
        exits.end(status, text, agreed=False)
        lease.release_all()
        os._exit(status)

    ours = {
        signal.SIGINT: (signal.default_int_handler, end),
        signal.SIGTERM: (_stop_alone, end),
    }
    with _handlers(ours), _heard_in_compiled_code(end):
        yield


@contextlib.contextmanager
def _heard_in_compiled_code(end: Callable[[int, object], None]) -> Iterator[None]:
    """Hears signals while the main thread is in compiled code, for which Python's handlers wait.

    A compilation may take minutes.
    """
    from deit_jax.parallel.preemption import StopSignal

    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def listen() -> None:
        while received := reader.recv(1):
            time.sleep(_HANDLER_SECONDS)
            stop = StopSignal.current
            nothing_to_save = stop is None or not stop.saves_first
            if signal.getsignal(received[0]) is end or (
                received[0] == signal.SIGTERM and nothing_to_save
            ):
                end(received[0], None)
        reader.close()

    threading.Thread(target=listen, daemon=True).start()
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()


@contextlib.contextmanager
def _handlers(wanted: dict[int, tuple[object, Callable]]) -> Iterator[None]:
    """Sets the handlers of signals: the second, where the present one is the first.

    It is another one where whoever started the process ignores the signal.
    """
    present = {number: signal.getsignal(number) for number in wanted}
    ours = {number for number, (before, _) in wanted.items() if present[number] is before}
    for number in ours:
        signal.signal(number, wanted[number][1])
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, present[number])
