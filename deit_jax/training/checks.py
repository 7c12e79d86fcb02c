"""What the processes of a run make sure of together before any long work."""

import os
import secrets
import time
from typing import TYPE_CHECKING

import jax
import jaxlib
import numpy as np
from ml_collections import ConfigDict

from deit_jax import folders, storage, trees
from deit_jax.config.files import recipe_fields
from deit_jax.errors import InputError, TransientError, brief
from deit_jax.parallel import hosts
from deit_jax.parallel.mesh import batch_sharding, make_mesh, replicated, to_global

if TYPE_CHECKING:
    from deit_jax.data import Source

_TOKEN = ".deit_jax.token."
_TRIAL = ".deit_jax.trial."
_LAG_SECONDS = 5  # that a network file system may take to show one host another's file


def check_processes(config: ConfigDict, workdir: str, *, mode: str) -> None:
    """Checks that all processes do the same, have as many devices, and share the workdir.

    Args:
      config: of the run.
      workdir: of the run.
      mode: what this process is about to do, as --mode names it.

    Raises:
      InputError: on every process; it names one that differs, and in what.
    """
    if not hosts.several():
        return
    facts = {"--mode": mode, "jax": jax.__version__, "jaxlib": jaxlib.__version__}
    facts |= {f"config.{name}": value for name, value in recipe_fields(config).items()}
    hosts.compare("the comparison of configs", facts)
    hosts.compare("the count of devices", {"local devices": jax.local_device_count()})
    _connect_devices()
    if mode != "plan":  # which writes nothing
        _check_shared(workdir)


def check_data(train_source: "Source | None", eval_source: "Source", teacher: bool | None) -> None:
    """Checks that both splits have the same classes, and all processes the same data.

    Each host may have a copy of the data.

    Args:
      train_source: the opened split; None for an evaluation.
      eval_source: likewise.
      teacher: whether the run's teacher is there already; None for a run without one.

    Raises:
      InputError: on every process, as `check_processes`.
    """
    if train_source is not None:
        _check_classes(train_source, eval_source)
    if not hosts.several():
        return
    facts = {
        "evaluation examples": eval_source.num_examples,
        "classes": eval_source.num_classes,
        "class names with digest": trees.digest(*eval_source.class_names),
        "evaluation data with digest": eval_source.fingerprint(),
        "a trained teacher:": teacher,
    }
    if train_source is not None:
        facts["training examples"] = train_source.num_examples
        facts["training data with digest"] = train_source.fingerprint()
    # A host that sees its data for the first time reads them all for their index.
    hosts.compare("the comparison of data", facts, seconds=hosts.LONG_SECONDS)


def _check_classes(train: "Source", evaluation: "Source") -> None:
    """Raises InputError for a single class, and where a label means another class in each split."""
    if train.num_classes == 1:
        raise InputError(
            f"{train.description} has one class{''.join(f', {name}' for name in train.class_names)}"
            ": there is nothing to learn; check config.dataset.root, which may be one folder too "
            "high"
        )
    other = folders.first_other(train.class_names, evaluation.class_names)
    if other is None and train.num_classes == evaluation.num_classes:
        return
    first = "; class {} is {!r} in one and {!r} in the other".format(*other) if other else ""
    raise InputError(
        f"{train.description} has {train.num_classes:,} classes, but {evaluation.description} "
        f"{evaluation.num_classes:,}{first}; both need the same classes"
    )


def check_weights(folder: str, weights: object) -> None:
    """Checks that all processes have read the same weights: each host may have its own `folder`.

    Raises:
      InputError: on every process, as `check_processes`.
    """
    if hosts.several():
        facts = {f"weights in {folder} with digest": trees.digest(*jax.tree.leaves(weights))}
        hosts.compare("the comparison of weights", facts, seconds=hosts.LONG_SECONDS)


def check_place(workdir: str) -> None:
    """Raises InputError where `workdir` cannot be made, or be written; writes nothing itself.

    Of a bucket nothing is said: only writing would tell.
    """
    folder = storage.path_of(workdir)
    if storage.is_remote(folder):
        return
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        problem = "read-only" if folder.is_dir() else "not a folder"
        raise InputError(f"--workdir={workdir} cannot be written ({folder} is {problem})")


def check_writing(workdir: str) -> None:
    """Makes the workdir and tries on it what completes a checkpoint.

    On a disk that is the renaming of a folder, in a bucket the writing of a file.

    Raises:
      InputError: it cannot be written; Cloud Storage FUSE may not rename, see docs/launch.md.
    """
    folder = storage.path_of(workdir)
    before, after = folder / f"{_TRIAL}before", folder / f"{_TRIAL}after"
    try:
        for left_behind in (before, after):
            storage.remove_folder(left_behind)
        before.mkdir(parents=True)
        (before / "file").write_text("")
        if not storage.is_remote(folder):
            before.rename(after)
    except Exception as error:  # gcsfs raises those of several libraries
        reason = getattr(error, "strerror", None) or brief(error)
        raise InputError(f"--workdir={workdir} cannot be written ({reason})") from error
    finally:
        for left_behind in (before, after):
            storage.remove_folder(left_behind)


def _connect_devices() -> None:
    """Counts the devices by a sum over all of them, while every process is here.

    CPU collectives wait 30 seconds for one another to connect, and compiling the first step may
    take one process longer than that.
    """
    mesh = make_mesh()
    mine = {"ones": np.ones(jax.local_device_count(), np.float32)}
    try:
        ones = to_global(mine, batch_sharding(mesh))["ones"]
        total = float(jax.jit(lambda x: x.sum(), out_shardings=replicated(mesh))(ones))
    except jax.errors.JaxRuntimeError as error:
        raise TransientError(
            f"a sum over the devices of all processes fails ({brief(error)}); can the hosts reach "
            "each other on every port?"
        ) from error
    if total != mesh.size:
        raise InputError(f"a sum over {mesh.size} devices is {total}; they or the network fail")


def _check_shared(workdir: str) -> None:
    """Raises InputError unless every process finds in `workdir` what process 0 writes there."""
    # A new name each time: no host remembers that it was not there.
    token, *_ = hosts.gather("the check of the workdir", secrets.token_hex(8))
    file = storage.path_of(workdir, _TOKEN + token)
    try:
        if hosts.is_first():
            file.parent.mkdir(parents=True, exist_ok=True)
            for left_behind in file.parent.glob(_TOKEN + "*"):
                left_behind.unlink(missing_ok=True)
            file.write_text("")
    except OSError as error:
        raise InputError(f"--workdir={workdir} cannot be written ({error})") from error
    hosts.gather("the check of the workdir", "written")
    deadline = time.monotonic() + _LAG_SECONDS
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    found = hosts.gather("the check of the workdir", str(file.exists()))
    if hosts.is_first():
        file.unlink()
    if "False" in found:
        raise InputError(
            f"{hosts.name(found.index('False'))} does not find in --workdir={workdir} what process "
            "0 wrote there; all processes need the same, shared folder"
        )
