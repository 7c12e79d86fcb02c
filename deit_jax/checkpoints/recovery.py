"""Training checkpoints that cannot be read, and the newest one that can."""

import errno
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorstore as ts

from deit_jax.console import log
from deit_jax.errors import InputError, TransientError, brief, system_errno
from deit_jax.parallel import hosts

_AT_ONCE = 16  # arrays
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)  # by which the system reports a lost file
_TRIES, _PAUSE_SECONDS = 3, 5


def newest_readable(directory: Path, *, set_aside: bool) -> int | None:
    """The step of the newest checkpoint that can be read, the same on every process.

    Newer ones that cannot be are named in a warning, and renamed where `set_aside` is true: then it
    returns once this process, too, sees what process 0 has left there.

    Raises:
      InputError: there are checkpoints, but none that can be read.
      TryAgain: the disk does not answer, or permits no reading.
    """

    def search() -> str:
        return json.dumps([_newest_readable(directory, set_aside), _steps(directory)])

    step, steps = json.loads(hosts.from_first("the search for a readable checkpoint", search))
    deadline = time.monotonic() + hosts.LAG_SECONDS
    while set_aside and _steps(directory) != steps and time.monotonic() < deadline:
        time.sleep(1)
    return step


def _steps(directory: Path) -> list[int]:
    """The steps with a checkpoint; a directory that is not there has none."""

    def names() -> list[str]:
        try:
            return os.listdir(directory)  # unlike glob, it does not pass over what is not permitted
        except FileNotFoundError:
            return []

    found = _patiently(names, directory, "mend that and start again")
    return sorted(int(name) for name in found if name.isdigit())


def _newest_readable(directory: Path, set_aside: bool) -> int | None:
    unreadable = []
    for step in reversed(_steps(directory)):
        problem = find_damage(directory / str(step))
        if problem is None:
            break
        unreadable.append((directory / str(step), problem))
    else:
        if unreadable:
            path, problem = unreadable[0]
            raise InputError(
                f"{path} cannot be read ({problem}), and there is no older checkpoint that can; "
                "put a copy in its place, or choose another --workdir to start anew"
            )
        return None
    for path, problem in unreadable:
        kept = f"; it stays as {_rename(path).name}" if set_aside else ""
        log(f"warning: {path} cannot be read ({problem}); using step {step} instead{kept}")
    return step


def _rename(path: Path) -> Path:
    """To a name that Orbax takes for no checkpoint: nothing is lost, and the step is free."""
    for number in itertools.count(1):
        aside = path.with_name(f"{path.name}.unreadable" + (f".{number}" if number > 1 else ""))
        if not aside.exists():
            return path.rename(aside)


def check_same_steps(directory: Path, steps: list[int]) -> None:
    """Raises InputError unless every process has found the same checkpoints."""

    def differing(told: list[str]) -> str | None:
        for number, theirs in enumerate(told):
            if theirs != told[0]:
                return (
                    f"{hosts.name(number)} finds the steps {theirs} in {directory}, but process"
                    f" 0 finds {told[0]}; all processes need the same, shared folder"
                )
        return None

    hosts.agree("the list of checkpoints", str(steps), differing)


def find_damage(folder: Path) -> str | None:
    """What is wrong with a training checkpoint, in a few words, or None if all of it can be read.

    Reads every array once, a few at a time, and keeps nothing: seconds for gigabytes that are to
    be read again, against an error in the middle of a restore that all processes take part in.

    Raises:
      TryAgain: the system refuses to read, which is no fault of the checkpoint: a network file
        system that is away for a while, a missing permission.
    """
    without = "mend that, or move it away to go on from the checkpoint before it"
    return _patiently(lambda: _find(folder), folder, without)


def _patiently(action: Callable[[], Any], folder: Path, remedy: str) -> Any:
    """What `action` returns, which is tried again after an OSError."""
    for left in reversed(range(_TRIES)):
        try:
            return action()
        except OSError as error:
            if not left:
                problem = f"{folder} cannot be read now ({error.strerror})"
                raise TransientError(f"{problem}; {remedy}") from error
            time.sleep(_PAUSE_SECONDS)


def _find(folder: Path) -> str | None:
    """`find`, where an OSError is the system's refusal."""
    try:
        _json(folder / "_CHECKPOINT_METADATA")
        _json(folder / "meta" / "metadata")
        if (folder / "metrics").exists():
            _json(folder / "metrics" / "metrics")
        state = folder / "state"
        for file in (state / "_sharding", *(state / "array_metadatas").glob("process_*")):
            _json(file)
        arrays = _arrays(state)
        for first in range(0, len(arrays), _AT_ONCE):
            names = arrays[first : first + _AT_ONCE]
            reads = [_open(state, name).result().read() for name in names]
            for read in reads:
                read.result()
    except (OSError, ValueError) as error:  # also what tensorstore raises
        number = system_errno(error)
        if number is not None and number not in _DAMAGE:
            raise OSError(number, os.strerror(number)) from error
        return brief(error)
    return None if arrays else "it holds no arrays"


def _arrays(state: Path) -> list[str]:
    try:
        return [
            ".".join(str(part["key"]) for part in entry["key_metadata"])
            for entry in _json(state / "_METADATA")["tree_metadata"].values()
            if entry["value_metadata"]["value_type"] == "jax.Array"
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"_METADATA is damaged: {error!r}") from error


def _json(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.name} is damaged: {error}") from error


def _open(state: Path, name: str) -> ts.Future:
    base = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{state}/"}, "path": f"{name}/"}
    return ts.open({"driver": "zarr", "kvstore": base}, open=True, read=True)
