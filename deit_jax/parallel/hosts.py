"""The processes of a run: connecting them, and comparing what each of them says."""

import itertools
import json
from typing import TYPE_CHECKING

import jax

from deit_jax import couplings
from deit_jax.errors import InputError, TransientError, brief
from deit_jax.parallel import cluster

if TYPE_CHECKING:
    from ml_collections import ConfigDict

LONG_SECONDS = 24 * 3600  # for what one process may do alone: read all data for their index
LAG_SECONDS = 90  # that a host may believe an older answer of a network file system
_exchanges = itertools.count()  # every process makes the same ones in the same order
_patience = 300  # seconds


def start(distributed: "ConfigDict") -> None:
    """Connects the processes of a run; does nothing for a process that is alone, or connected.

    Must run before anything touches a device. The fields of the config win over what a cluster
    says. JAX aborts a process that waits in vain for the others; `exits.connect` ends it first.

    Raises:
      TransientError: the processes cannot be connected.
    """
    global _patience
    _patience = distributed.start_timeout
    explicit = distributed.num_processes > 1 or distributed.coordinator_address
    kind = cluster.detect() if distributed.auto and not explicit else None
    if jax.distributed.is_initialized() or not (explicit or kind):
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
    # It would keep SIGTERM for good, and Orbax's threads ask it about steps long past.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=_patience + 60)
    except Exception as error:  # whatever a cluster's own detection may raise
        if couplings.is_no_cluster(error):
            cluster.refuse_alone(kind)
            return
        where = couplings.distributed_state().coordinator_address
        raise TransientError(
            f"cannot connect the processes{f' at {where}' if where else f' of {kind}'} "
            f"({brief(error)}); is the port free on process 0? see config.distributed, or "
            f"{cluster.SWITCH_OFF}"
        ) from error


def index() -> int:
    """Returns the number of this process."""
    return couplings.distributed_state().process_id


def is_first() -> bool:
    """Returns whether this process is the one that prints and writes for all."""
    return index() == 0


def count() -> int:
    """Returns how many processes the run has."""
    return couplings.distributed_state().num_processes


def several() -> bool:
    """Returns whether the run has several processes."""
    return count() > 1


def name(number: int) -> str:
    """Returns "process I of N"."""
    return f"process {number} of {count()}"


def label() -> str:
    """Returns "process I of N: " for the lines of one process of several, else ""."""
    return f"{name(index())}: " if several() else ""


def gather(what: str, mine: str, *, seconds: float | None = None) -> list[str]:
    """Returns what every process says, in their order; all must come here, in the same order.

    Unlike a collective it needs no device, and ends where a process does not come.

    Args:
      what: names the place where a process that does not come is missed.
      mine: what this process says.
      seconds: to wait for the others; `distributed.start_timeout` by default.

    Raises:
      TransientError: a process did not come.
    """
    if not several():
        return [mine]
    key = f"deit_jax/exchange/{next(_exchanges)}/"
    couplings.store().key_value_set(f"{key}{index()}", mine)
    said, milliseconds = [], round(1000 * (seconds or _patience))
    for number in range(count()):
        try:
            said.append(couplings.store().blocking_key_value_get(f"{key}{number}", milliseconds))
        except jax.errors.JaxRuntimeError as error:
            raise TransientError(
                f"{name(number)} did not come to {what} in time; see what it printed"
            ) from error
    return said


def compare(what: str, facts: dict[str, object], *, seconds: float | None = None) -> None:
    """Compares `facts` (values as JSON has them) between all processes; see `gather`.

    Raises:
      InputError: on every process; it names one that differs, and in what.
    """
    first, *rest = map(json.loads, gather(what, json.dumps(facts), seconds=seconds))
    for number, other in enumerate(rest, start=1):
        for fact in first | other:
            if first.get(fact) != other.get(fact):
                raise InputError(
                    f"{name(number)} has {fact} {other.get(fact)!r}, but process 0 has "
                    f"{first.get(fact)!r}; they must be the same on every process"
                )
