"""What the environment says of the processes of a run that a cluster has started."""

import importlib.util
import os
import re
from collections.abc import Mapping

from deit_jax.errors import InputError

SWITCH_OFF = "--config.distributed.auto=False runs this process alone"
OWN_FIELDS = "config.distributed.{coordinator_address,num_processes,process_id}"


def detect(environment: Mapping[str, str] = os.environ) -> str | None:
    """The kind of cluster that has, or may have, started several processes of this run, or None.

    What JAX itself would detect, but for what also holds of a process that someone started alone:
    a shell within a Slurm allocation, a notebook in a Kubernetes pod, a run on a TPU host's CPU.

    Raises:
      InputError: several processes, whose coordinator JAX cannot find.
    """

    def number(name: str) -> int:
        return int(environment.get(name, "1"))

    if number("OMPI_COMM_WORLD_SIZE") > 1:
        if "OMPI_MCA_orte_hnp_uri" not in environment:
            raise InputError(
                f"Open MPI started {number('OMPI_COMM_WORLD_SIZE')} processes, but JAX finds their "
                f"coordinator with Open MPI 4 only; set {OWN_FIELDS}, or {SWITCH_OFF}"
            )
        return "Open MPI"
    # A step has tasks of its own number; without srun there is no step, whatever was allocated.
    if "SLURM_STEP_NODELIST" in environment and "SLURM_PROCID" in environment:
        if number("SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else
                  "SLURM_NTASKS") > 1:  # fmt: skip
            return "Slurm"
        return None
    platforms = environment.get("JAX_PLATFORMS", "")
    if importlib.util.find_spec("libtpu") and (not platforms or "tpu" in platforms):
        hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
        if hosts is not None:  # Google Kubernetes Engine
            several = "," in hosts or number("MEGASCALE_NUM_SLICES") > 1
            return "Cloud TPU" if several else None
        if "TPU_SKIP_MDS_QUERY" not in environment:  # JAX sets it where there are no TPU chips
            return "Cloud TPU"  # a slice of one host, too, has an address to connect to
    for variable in ("PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        if number(variable) > 1:
            raise InputError(
                f"an MPI that JAX does not know started {number(variable)} processes ({variable}); "
                f"use Open MPI 4, or set {OWN_FIELDS}, or {SWITCH_OFF}"
            )
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        if importlib.util.find_spec("kubernetes") is None:
            raise InputError(
                "this is one pod of an indexed Kubernetes job, but JAX finds the others by the "
                f"kubernetes package only; pip install kubernetes, or set {OWN_FIELDS}, or "
                f"{SWITCH_OFF}"
            )
        return "Kubernetes"
    return None


def alone_on_its_host(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether Slurm or Open MPI started one process on each host, which then has all devices."""
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    return (
        environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
        or re.fullmatch(r"1(\(x\d+\))?", tasks) is not None
    )


def number_and_count(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """This process's number and how many there are, where what started it says so; else (0, 1)."""
    for mine, among in (
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ):
        numbers = environment.get(mine, ""), environment.get(among, "")
        if all(text.isdecimal() for text in numbers):
            return int(numbers[0]), int(numbers[1])
    hosts, mine = environment.get("TPU_WORKER_HOSTNAMES", ""), environment.get("TPU_WORKER_ID", "")
    return (int(mine), hosts.count(",") + 1) if mine.isdecimal() else (0, 1)
