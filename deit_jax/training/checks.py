"""What the processes of a run make sure of together before any long work."""

import json
import os
import secrets
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jaxlib
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from deit_jax import trees
from deit_jax.config.files import recipe_fields
from deit_jax.errors import InputError, TransientError, brief
from deit_jax.parallel import hosts
from deit_jax.parallel.mesh import replicated, to_global

if TYPE_CHECKING:
    from deit_jax.data import Source

_TOKEN = ".deit_jax.token."
_RENAMING = ".deit_jax.renaming."
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
    if not hosts.several():
        return
    hosts.agree("the comparison of configs", _facts(config, mode), _differing_fact)
    devices = {"devices": jax.device_count(), "local devices": jax.local_device_count()}
    hosts.agree("the count of devices", json.dumps(devices), _differing_fact)
    _check_sum()
    if mode != "plan":  # which writes nothing
        _check_workdir(workdir)


def check_data(train_source: "Source", eval_source: "Source", teacher: bool | None) -> None:
    """Checks that all processes have the same data, of which each host may have a copy.

    Args:
      train_source: the opened split.
      eval_source: likewise.
      teacher: whether the run's teacher is there already; None for a run without one.

    Raises:
      InputError: on every process, as `check_processes`.
    """
    if not hosts.several():
        return
    facts = {
        "training examples": train_source.num_examples,
        "evaluation examples": eval_source.num_examples,
        "classes": train_source.num_classes,
        "class names with digest": trees.digest(*train_source.class_names),
        "training data with digest": train_source.fingerprint(),
        "evaluation data with digest": eval_source.fingerprint(),
        "a trained teacher:": teacher,
    }
    # A host that sees its data for the first time reads them all for their index.
    hosts.agree(
        "the comparison of data",
        json.dumps(facts),
        _differing_fact,
        seconds=hosts.LONG_SECONDS,
    )


def check_weights(folder: str, weights: object) -> None:
    """Checks that all processes have read the same weights: each host may have its own `folder`.

    Raises:
      InputError: on every process, as `check_processes`.
    """
    if not hosts.several():
        return
    digest = trees.digest(*jax.tree.leaves(weights))
    hosts.agree(
        f"the comparison of the weights in {folder}",
        json.dumps({f"weights in {folder} with digest": digest}),
        _differing_fact,
        seconds=hosts.LONG_SECONDS,
    )


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
                    f"{hosts.name(index)} has {name} {other.get(name)!r}, but process 0 has "
                    f"{first.get(name)!r}; they must be the same on every process"
                )
    return None


def _check_sum() -> None:
    """Adds up over all devices what every process knows of itself."""
    mesh = Mesh(np.array(jax.devices()), ("all",))
    mine = np.full(jax.local_device_count(), 1.0 + jax.process_index(), np.float32)
    split = NamedSharding(mesh, PartitionSpec("all"))
    try:
        rows = to_global({"rows": mine}, split)["rows"]
        total = float(jax.jit(lambda x: x.sum(), out_shardings=replicated(mesh))(rows))
    except jax.errors.JaxRuntimeError as error:
        raise TransientError(  # a process that died in between, perhaps
            f"a sum over the devices of all processes fails ({brief(error)}); can the hosts reach "
            "each other on every port?"
        ) from error
    count = jax.process_count()
    expected = float(jax.local_device_count() * count * (count + 1) // 2)

    def wrong(told: list[str]) -> str | None:
        for index, text in enumerate(told):
            if float(text) != expected:
                return (
                    f"a sum over the devices of all processes is {text} on {hosts.name(index)},"
                    f" but must be {expected}; its devices or its network are faulty"
                )
        return None

    hosts.agree("a sum over all devices", str(total), wrong)


def check_place(workdir: str) -> None:
    """Raises InputError where `workdir` cannot be made, or be written; writes nothing itself."""
    folder = Path(workdir).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        problem = "read-only" if folder.is_dir() else "no folder"
        raise InputError(f"--workdir={workdir} cannot be written ({folder} is {problem})")


def check_renaming(workdir: str) -> None:
    """Makes a folder in `workdir` and renames it, as every checkpoint is when it is complete.

    Raises:
      OSError: the file system does not; Cloud Storage FUSE may not, see docs/launch.md.
    """
    before, after = Path(workdir, _RENAMING + "before"), Path(workdir, _RENAMING + "after")
    for left_behind in (before, after):
        shutil.rmtree(left_behind, ignore_errors=True)
    try:
        before.mkdir()
        (before / "file").touch()
        before.rename(after)
    finally:
        shutil.rmtree(before, ignore_errors=True)
        shutil.rmtree(after, ignore_errors=True)


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

    token = hosts.from_first("the check of the workdir", write)
    # Of a new name: no host remembers that it was not there, or what it said.
    file = Path(workdir, _TOKEN + token)
    found = _read(file, token)

    def differing(told: list[str]) -> str | None:
        for index, text in enumerate(told):
            if text != token:
                return (
                    f"{hosts.name(index)} does not find in --workdir={workdir} what process 0 "
                    f"wrote there ({text}); all processes need the same, shared folder"
                )
        return None

    try:
        hosts.agree("the check of the workdir", found, differing)
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
