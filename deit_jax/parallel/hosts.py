"""Processes of one run: connecting them, agreeing with them, ending with them."""

import contextlib
import itertools
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

import jax

# JAX has no public name for its store of keys and values, nor for the number of a process that is
# still connecting.
from jax._src.distributed import global_state

from deit_jax.console import log, log_error
from deit_jax.errors import InputError, TransientError, brief
from deit_jax.parallel import cluster

if TYPE_CHECKING:
    from ml_collections import ConfigDict

POLL_SECONDS = 0.5  # how often a process looks for what the others have to say
LONG_SECONDS = 24 * 3600  # for what one process may have to do alone: read all of a checkpoint
LAG_SECONDS = 90  # that a host may believe an older answer of a network file system
_GRACE_SECONDS = 15  # for the others to see why process 0, which holds all notices, goes away
_LAST_SECONDS = 0.5  # for them to end after their last notice: JAX aborts who outlives process 0
_PREFIX = "deit_jax/"
_FAILED, _GONE = "failed/", "gone/"
_numbers = itertools.count()  # of exchanges, which every process makes in the same order
_patience = 300  # seconds
_watcher: threading.Thread | None = None  # there once the processes are connected
_ending = threading.RLock()  # of the thread that ends this process, which never gives it back


def start(distributed: "ConfigDict") -> None:
    """Connects the processes of a run; does nothing for a process that is alone.

    Must run before anything touches a device. The fields of the config win over what a cluster
    says. A run that trains its teacher first comes here twice.

    Raises:
      TryAgain: the processes cannot be connected. One that waits in vain for the others ends by
        itself, since JAX does not give up without a crash.
    """
    global _patience
    _patience = distributed.start_timeout
    if jax.distributed.is_initialized():
        _start_watching()
        return
    explicit = distributed.num_processes > 1 or distributed.coordinator_address
    kind = cluster.detect() if distributed.auto and not explicit else None
    if not explicit and kind is None:
        return
    arguments = {}
    if explicit:
        arguments = {
            "coordinator_address": distributed.coordinator_address,
            "num_processes": distributed.num_processes,
            "process_id": distributed.process_id,
            "cluster_detection_method": "deactivate",
        }
    elif cluster.alone_on_its_host():
        arguments = {"local_device_ids": ()}  # all of them: JAX would give it the first GPU only
    jax.config.update("jax_enable_preemption_service", False)  # `stopping` has SIGTERM
    alarm = threading.Timer(_patience, _nobody_came)
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=_patience + 60)
    except Exception as error:  # whatever a cluster's own detection may raise
        if kind is not None and global_state.coordinator_address is None:
            if "coordinator_address should be defined" in str(error):
                return  # JAX does not see a cluster, so there is none
            raise TransientError(
                f"the processes of {kind} cannot be found ({brief(error)}); set "
                f"{cluster.OWN_FIELDS}, or {cluster.SWITCH_OFF}"
            ) from error
        raise TransientError(
            f"cannot connect the processes at {global_state.coordinator_address} ({brief(error)}); "
            "is the port free on process 0? see config.distributed"
        ) from error
    finally:
        alarm.cancel()
    _start_watching()


def _start_watching() -> None:
    global _watcher
    if several() and _watcher is None:
        _watcher = threading.Thread(target=_watch, daemon=True)
        _watcher.start()


def _nobody_came() -> None:
    where = global_state.coordinator_address
    log_error(
        f"{label()}error: not all processes connected to {where} within {_patience} s "
        "(config.distributed.start_timeout); start the same command once for each process, and "
        "check config.distributed and what the others printed"
    )
    os._exit(TransientError.exit_status)


def index() -> int:
    """The number of this process; unlike `jax.process_index` it starts no backend."""
    return global_state.process_id


def is_first() -> bool:
    """Whether this process is the one that prints and writes for all."""
    return index() == 0


def count() -> int:
    """How many processes the run has."""
    return global_state.num_processes


def several() -> bool:
    """Whether the run has several processes; they may be connecting yet."""
    return count() > 1


def connected() -> bool:
    """Whether there are other processes that can be told something."""
    return _watcher is not None


def label(distributed: "ConfigDict | None" = None) -> str:
    """ "process I of N: " for the lines of one process of several, else "".

    Before the processes are connected only the config's fields can tell, and what started them.
    """
    mine, among = index(), count()
    if among == 1 and distributed is not None:
        mine, among = distributed.process_id, distributed.num_processes
        if among == 1 and distributed.auto:
            mine, among = cluster.number_and_count()
    return f"process {mine} of {among}: " if among > 1 else ""


def name(number: int) -> str:
    """ "process I of N"."""
    return f"process {number} of {count()}"


def agree(
    what: str,
    mine: str,
    judge: Callable[[list[str]], str | None],
    *,
    seconds: float | None = None,
) -> None:
    """Lets process 0 judge what all processes say; every process must come here, in one order.

    Args:
      what: names the place where a process that does not come is missed.
      mine: what this process says.
      judge: from what they say, by number, to what is wrong with it, or None.
      seconds: that process 0 waits for the others; `start_timeout` by default.

    Raises:
      InputError: on every process, what `judge` found.
      TryAgain: a process did not come.
    """
    if not several():
        return
    seconds = seconds or _patience
    key = f"exchange/{next(_numbers)}/"
    post(f"{key}{index()}", mine)
    if index() == 0:
        deadline = time.monotonic() + seconds
        told = [_wait(f"{key}{i}", i, what, deadline - time.monotonic()) for i in range(count())]
        post(key + "verdict", judge(told) or "")
    # Longer than process 0 waits, which alone knows who is missing.
    verdict = _wait(key + "verdict", 0, what, seconds + 60)
    if verdict:
        raise InputError(verdict)


def from_first(what: str, make: Callable[[], str]) -> str:
    """What `make` returns on process 0, on every process; the others do not call it."""
    if not several():
        return make()
    key = f"exchange/{next(_numbers)}"
    if index() == 0:
        post(key, make())
    return _wait(key, 0, what, LONG_SECONDS)


def _wait(key: str, source: int, what: str, seconds: float) -> str:
    milliseconds = max(1, round(1000 * seconds))
    try:
        return global_state.client.blocking_key_value_get(_PREFIX + key, milliseconds)
    except jax.errors.JaxRuntimeError as error:
        raise TransientError(
            f"{name(source)} did not come to {what} in time; see what it printed"
        ) from error


def post(key: str, text: str) -> None:
    """Puts a notice where every process can read it; the first under a key stays."""
    try:
        global_state.client.key_value_set(_PREFIX + key, text)
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise


def posted(folder: str) -> dict[str, str]:
    """The notices under `folder`, by what follows it in their keys; none before connecting."""
    if not connected():
        return {}
    entries = global_state.client.key_value_dir_get(_PREFIX + folder)
    return {key.rpartition("/")[2]: text for key, text in entries}


def _watch() -> None:
    """Ends this process where another one fails: it would wait for it in vain."""
    while True:
        time.sleep(POLL_SECONDS)
        try:
            failed = posted(_FAILED)
        except jax.errors.JaxRuntimeError:  # where process 0 is gone, JAX itself ends this one
            continue
        if failed:
            _claim_the_end()
            number, notice = min(failed.items())
            status, _, text = notice.partition(" ")
            log_error(f"{label()}error: {name(int(number))} failed: {text}")
            _leave(int(status))


def let_others_end_it() -> None:
    """Waits long enough for this process to be ended where what it met is another one's failure."""
    if connected():
        time.sleep(4 * POLL_SECONDS)


def fail(text: str, *, status: int, said: str | None = None) -> NoReturn:
    """Ends this process at once, and every other one of the run with the same status.

    Args:
      text: the reason, which every process prints.
      status: of the processes.
      said: what this one prints instead.
    """
    _claim_the_end()
    log_error(f"{label()}error: {text}" if said is None else said)
    if connected():
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is gone, nobody can read
            post(f"{_FAILED}{index()}", f"{status} {text}")
    _leave(status)


def crash(error: BaseException) -> NoReturn:
    """`fail` for an error that nobody foresaw, with its traceback."""
    trace = "".join(traceback.format_exception(error))
    fail("it crashed; see its traceback", status=1, said=trace)


def leave(text: str = "", *, status: int = 0) -> NoReturn:
    """Ends this process at once, with a line that says why; the others do likewise.

    Python's own end waits for threads that have nothing left to do, and JAX aborts a process whose
    end comes after that of process 0.
    """
    _claim_the_end()
    log(text, on=bool(text))
    _leave(status)


def _claim_the_end() -> None:
    """Returns in the first thread that ends this process, and in no other one."""
    if not _ending.acquire(blocking=False):
        threading.Event().wait()


def _leave(status: int) -> NoReturn:
    """Waits for no thread of this process; process 0 goes last."""
    for stream in (sys.stdout, sys.stderr):
        # See `console`; a signal's handler may have come in the middle of another line.
        with contextlib.suppress(OSError, ValueError, AttributeError, RuntimeError):
            stream.flush()
    if connected():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            post(f"{_GONE}{index()}", "")
            deadline = time.monotonic() + _GRACE_SECONDS
            while index() == 0 and len(posted(_GONE)) < count() and time.monotonic() < deadline:
                time.sleep(0.05)
        if index() == 0:
            time.sleep(_LAST_SECONDS)
    os._exit(status)
