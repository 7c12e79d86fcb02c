"""What the processes of a run make sure of together before any long work."""

import json
import secrets
import time
from pathlib import Path

import jax
import jaxlib
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from deit_jax import parallel, processes
from deit_jax.config import recipe_fields
from deit_jax.errors import InputError, brief

_TOKEN = ".deit_jax.token."
_LAG_SECONDS = 5  # that a network file system may take to show one host another's file


def check_processes(config: ConfigDict, workdir: str, *, mode: str) -> None:
    """Checks that all processes run the same, add up, and share the workdir.

    Args:
      config: of the run.
      workdir: of the run.
      mode: what this process is about to do, as --mode names it.

    Raises:
      InputError: on every process; it names one that differs, and in what.
    """
    if not processes.several():
        return
    processes.agree("the comparison of configs", _facts(config, mode), _differing_fact)
    devices = {"devices": jax.device_count(), "local devices": jax.local_device_count()}
    processes.agree("the count of devices", json.dumps(devices), _differing_fact)
    _check_sum()
    _check_workdir(workdir)


def _facts(config: ConfigDict, mode: str) -> str:
    fields = {f"config.{name}": value for name, value in recipe_fields(config).items()}
    own = {"--mode": mode, "jax": jax.__version__, "jaxlib": jaxlib.__version__}
    return json.dumps(own | fields)


def _differing_fact(told: list[str]) -> str | None:
    first, *rest = map(json.loads, told)
    for index, other in enumerate(rest, start=1):
        for name in first.keys() | other.keys():
            if first.get(name) != other.get(name):
                return (
                    f"{processes.name(index)} has {name} {other.get(name)!r}, but process 0 has "
                    f"{first.get(name)!r}; they must be the same on every process"
                )
    return None


def _check_sum() -> None:
    """Adds up over all devices what every process knows of itself."""
    mesh = Mesh(np.array(jax.devices()), ("all",))
    mine = np.full(jax.local_device_count(), 1.0 + jax.process_index(), np.float32)
    split = NamedSharding(mesh, PartitionSpec("all"))
    try:
        rows = parallel.to_global({"rows": mine}, split)["rows"]
        total = float(jax.jit(lambda x: x.sum(), out_shardings=parallel.replicated(mesh))(rows))
    except jax.errors.JaxRuntimeError as error:
        raise InputError(
            f"a sum over the devices of all processes fails ({brief(error)}); can the hosts reach "
            "each other on every port?"
        ) from error
    count = jax.process_count()
    expected = float(jax.local_device_count() * count * (count + 1) // 2)

    def wrong(told: list[str]) -> str | None:
        for index, text in enumerate(told):
            if float(text) != expected:
                return (
                    f"a sum over the devices of all processes is {text} on {processes.name(index)},"
                    f" but must be {expected}; its devices or its network are faulty"
                )
        return None

    processes.agree("a sum over all devices", str(total), wrong)


def _check_workdir(workdir: str) -> None:
    """Every process must read there what process 0 has just written."""

    def write() -> str:
        token = secrets.token_hex(8)
        try:
            folder = Path(workdir)
            folder.mkdir(parents=True, exist_ok=True)
            for left_behind in folder.glob(_TOKEN + "*"):
                left_behind.unlink(missing_ok=True)
            (folder / (_TOKEN + token)).write_text(token, encoding="utf-8")
        except OSError as error:
            raise InputError(f"--workdir={workdir} cannot be written ({error})") from error
        return token

    token = processes.from_first("the check of the workdir", write)
    # Of a new name: no host remembers that it was not there, or what it said.
    file = Path(workdir, _TOKEN + token)
    found = _read(file, token)

    def differing(told: list[str]) -> str | None:
        for index, text in enumerate(told):
            if text != token:
                return (
                    f"{processes.name(index)} does not find in --workdir={workdir} what process 0 "
                    f"wrote there ({text}); all processes need the same, shared folder"
                )
        return None

    try:
        processes.agree("the check of the workdir", found, differing)
    finally:
        if jax.process_index() == 0:
            file.unlink(missing_ok=True)


def _read(file: Path, token: str) -> str:
    """The token, or in a few words what is there instead."""
    deadline = time.monotonic() + _LAG_SECONDS
    while True:
        try:
            found = file.read_text(encoding="utf-8")
            if found == token:
                return token
            problem = "the file says something else"
        except OSError as error:
            problem = error.strerror or str(error)
        if time.monotonic() > deadline:
            return problem
        time.sleep(0.2)
