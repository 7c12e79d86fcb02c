"""What the environment says about the processes of a run that a cluster has started."""

import importlib.util
import os
import re
from collections.abc import Mapping

from deit_jax.errors import InputError

SWITCH_OFF = "--config.distributed.auto=False runs this process alone"
_COUNTS = {
    "SLURM_STEP_NUM_TASKS": "Slurm",  # of srun; without it there is no step
    "OMPI_COMM_WORLD_SIZE": "Open MPI",
    "PMI_SIZE": "MPI",
    "MV2_COMM_WORLD_SIZE": "MPI",
}


def detect(environment: Mapping[str, str] = os.environ) -> str | None:
    """Returns the kind of cluster that has, or may have, started several processes, or None.

    JAX's own detection also fires for a process that someone started alone: a shell within a Slurm
    allocation, a notebook in a Kubernetes pod, a run on a TPU host's CPU.
    """
    for variable, kind in _COUNTS.items():
        if int(environment.get(variable) or "1") > 1:  # set and empty is as good as unset
            return kind
    if environment.get("SLURM_STEP_NUM_TASKS"):
        return None
    platforms = environment.get("JAX_PLATFORMS", "")
    if importlib.util.find_spec("libtpu") and (not platforms or "tpu" in platforms):
        hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
        if hosts is not None:  # Google Kubernetes Engine
            several = "," in hosts or int(environment.get("MEGASCALE_NUM_SLICES") or "1") > 1
            return "Cloud TPU" if several else None
        if "TPU_SKIP_MDS_QUERY" not in environment:  # JAX sets it where there are no TPU chips
            return "Cloud TPU"  # a slice of one host, too, has an address to connect to
    pod = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys()
    return "Kubernetes" if pod else None


def refuse_alone(kind: str) -> None:
    """Raises InputError where JAX does not find the processes that a cluster started.

    Each alone on one workdir would be worse. On a TPU machine, JAX knows when there are no others.
    """
    if kind != "Cloud TPU":
        raise InputError(
            f"{kind} started several processes, but JAX cannot find them; it needs srun, Open MPI "
            "(5 with mpi4py), or pip install kubernetes; else set config.distributed."
            "{coordinator_address,num_processes,process_id}, or " + SWITCH_OFF
        )


def alone_on_its_host(environment: Mapping[str, str] = os.environ) -> bool:
    """Returns whether Slurm or Open MPI started one process a host, which then has all devices."""
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    return (
        environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
        or re.fullmatch(r"1(\(x\d+\))?", tasks) is not None
    )
