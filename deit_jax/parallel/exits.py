"""Ends all processes of a run together: for the command line, which alone may end the interpreter.

A process that waits for one that has failed would wait for ever, Python's own end would wait for
the others where several are connected, and JAX aborts any process that outlives process 0.
"""

import contextlib
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

import jax

from deit_jax import couplings
from deit_jax.console import log, log_error
from deit_jax.errors import Preempted, TransientError
from deit_jax.parallel import hosts, lease

if TYPE_CHECKING:
    from ml_collections import ConfigDict

_FAILED = "deit_jax/failed"
_GRACE_MS = 15_000  # for the others to come to the end, too
_LAST_SECONDS = 1  # for them to be gone before process 0
_NOTICE_SECONDS = 2  # in which a failure's notice reaches the others
_ending = threading.RLock()  # of the thread that ends this process, which never gives it back
_connected = False


def connect(distributed: "ConfigDict") -> None:
    """Connects the processes of a run; from now on they end together.

    Raises:
      TransientError: see `hosts.start`. A process that waits in vain for the others is ended.
    """
    global _connected
    alarm = threading.Timer(distributed.start_timeout, _nobody_came, [distributed.start_timeout])
    alarm.daemon = True
    alarm.start()
    try:
        hosts.start(distributed)
    finally:
        alarm.cancel()
    if hosts.several() and not _connected:
        _connected = True
        threading.Thread(target=_watch, daemon=True).start()


def _nobody_came(seconds: int) -> None:
    where = couplings.distributed_state().coordinator_address
    log_error(
        f"{hosts.label()}error: not all processes connected to {where} within {seconds} s "
        "(config.distributed.start_timeout); start the same command once for each process, and "
        "check config.distributed and what the others printed"
    )
    os._exit(TransientError.exit_status)


def _watch() -> None:
    """Ends this process where another one fails."""
    while True:
        try:
            notice = couplings.store().blocking_key_value_get(_FAILED, 3_600_000)
        except jax.errors.JaxRuntimeError:  # where process 0 is gone, JAX itself ends this one
            time.sleep(1)
            continue
        number, status, reason = notice.split(" ", 2)
        if int(number) == hosts.index():
            return
        claim_the_end()
        if int(status) == Preempted.exit_status:
            log(f"deit-jax: {hosts.label()}{hosts.name(int(number))} {reason}")
        else:
            log_error(f"{hosts.label()}error: {hosts.name(int(number))} failed: {reason}")
        _leave(int(status))


def let_others_end_it() -> None:
    """Waits until this process is ended where what it met is the failure of another one."""
    if _connected:
        time.sleep(_NOTICE_SECONDS)


def claim_the_end() -> None:
    """Returns in the first thread that ends this process, and in no other one: print the last line.

    Does nothing for a process that is alone.
    """
    if _connected and not _ending.acquire(blocking=False):
        threading.Event().wait()


def end(status: int, reason: str = "", *, agreed: bool = True) -> None:
    """Ends this process and those connected; returns where it is alone.

    Args:
      status: of this process; of all, where they have not come to the end together.
      reason: why, which the other processes print then.
      agreed: with status 0 or 75, all of them have come to the end together.
    """
    if not _connected:
        return
    claim_the_end()
    if not agreed or status not in (0, Preempted.exit_status):
        notice = f"{hosts.index()} {status} {reason}"
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was first, or is gone
            couplings.store().key_value_set(_FAILED, notice)
    _leave(status)


def _leave(status: int) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # one is gone already
        couplings.store().wait_at_barrier("deit_jax/end", _GRACE_MS)
    if hosts.is_first():
        time.sleep(_LAST_SECONDS)
    for stream in (sys.stdout, sys.stderr):
        # See `console`; a signal's handler may have come in the middle of another line.
        with contextlib.suppress(OSError, ValueError, AttributeError, RuntimeError):
            stream.flush()
    lease.release_all()
    os._exit(status)
