"""Everything that deit-jax uses beyond the public interfaces of its libraries.

Private names of JAX, texts of other people's errors, and what Orbax prints and does in its threads:
an upgrade may break them. tests/test_couplings.py checks each.
"""

import contextlib
import logging
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator


def distributed_state() -> object:
    """Returns what JAX knows of the processes that it connects, without starting a backend.

    It has `process_id`, `num_processes` and `coordinator_address`, all of them known while the
    processes are connecting yet, and as `client` the coordinator's store of keys and values.
    """
    from jax._src.distributed import global_state

    return global_state


def store() -> object:
    """Returns the keys and values that process 0 keeps for all processes."""
    return distributed_state().client


def is_no_cluster(error: BaseException) -> bool:
    """Whether `jax.distributed.initialize()` failed because it detects no cluster."""
    return "coordinator_address should be defined" in str(error)


def count_tpus() -> int:
    """The number of TPU chips of this machine, as JAX counts them before it asks libtpu."""
    from jax._src.hardware_utils import num_available_tpu_chips_and_device_id

    return num_available_tpu_chips_and_device_id()[0]


def system_errno(error: BaseException | None) -> int | None:
    """The number of the system's refusal to read or write, behind an error or its causes; or None.

    tensorstore raises a ValueError of many lines, with the number in it, and Orbax an Exception
    that it causes.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if found := re.search(r"os_error_code='(\d+)'", str(error)):
            return int(found[1])
        error = error.__cause__
    return None


def is_unreadable(error: BaseException) -> bool:
    """Whether Orbax says by `error` that a file is missing or damaged; else it may be our mistake.

    Where an array cannot be read it raises a bare Exception, and where a file of its own has
    fields that it does not expect, whatever comes of that.
    """
    if isinstance(error, (OSError, ValueError, KeyError)) or type(error) is Exception:
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, Exception) and bool(frames) and "orbax" in frames[-1].filename


def orbax_barrier(failed: Callable[[BaseException], None]) -> Callable[..., None]:
    """Orbax's barrier between processes, but for a background save that has failed here.

    A process whose share of a checkpoint could not be written would wait in the barrier of a
    `finally` before it reports the failure, and the others in another one for its share.
    """
    import orbax.checkpoint as ocp

    def barrier(*, key: str, timeout_ms: int) -> None:
        error = sys.exception()
        if error is not None and threading.current_thread() is not threading.main_thread():
            failed(error)
            raise error
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    return barrier


_ROUTINE = (  # Orbax's warnings of files that are gone, and of what a killed save has left behind
    "Metadata file does not exist",
    "Unable to find the step",
    "Attempted to create temporary directory",
)


def silence_orbax() -> None:
    """Silences Orbax's routine messages, and the pages that it prints about errors that it raises.

    For a program, at its start: it changes what the whole process logs.
    """

    def wanted(record: logging.LogRecord) -> bool:
        ours = "orbax" in record.pathname
        text = str(record.msg)
        return not ours or not (record.levelno >= logging.ERROR or text.startswith(_ROUTINE))

    def unraisable(failed: object) -> None:
        # Orbax gives up at the first array; the readers of the others then miss its event loop.
        if str(failed.exc_value) != "Event loop is closed" and "_read_array" not in repr(
            failed.object
        ):
            sys.__unraisablehook__(failed)

    logging.getLogger("absl").addFilter(wanted)
    for name in ("asyncio", "gcsfs"):  # gcsfs prints a traceback at each retry
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = unraisable


@contextlib.contextmanager
def converting_to_onnx() -> Iterator[None]:
    """Keeps jax2onnx 0.13 quick and quiet.

    The time of its search for reshapes that undo one another grows with the third power of the
    depth, to hours; onnxruntime has its own. It warns of what it cannot convert of other libraries,
    and onnx_ir of values without a type.
    """
    from jax2onnx.converter import ir_optimizations

    name = "remove_redundant_reshape_pairs_ir"
    search = getattr(ir_optimizations, name)
    loggers = [logging.getLogger(name) for name in ("jax2onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    setattr(ir_optimizations, name, lambda graph: None)
    try:
        yield
    finally:
        setattr(ir_optimizations, name, search)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
