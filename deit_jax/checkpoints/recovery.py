"""Restores the newest training checkpoint that can be read, and sets newer ones aside."""

import errno
import itertools
import json
import os
import time
from collections.abc import Callable
from typing import Any

import orbax.checkpoint as ocp

from deit_jax import couplings, storage
from deit_jax.console import log
from deit_jax.errors import InputError, TransientError, brief
from deit_jax.parallel import hosts

_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)  # by which the system reports a lost file


def is_step(name: str) -> bool:
    """Returns whether a folder's name is a step's number."""
    return name.isascii() and name.isdigit()  # "²" is a digit, but no number


def steps_in(directory: storage.Path) -> list[int]:
    """Returns the steps with a complete checkpoint; a directory that is not there has none."""
    try:  # unlike glob, iterdir does not pass over what is not permitted
        found = sorted(int(path.name) for path in directory.iterdir() if is_step(path.name))
    except FileNotFoundError:
        return []
    if storage.is_remote(directory):  # a folder gets its name before its content there
        found = [step for step in found if ocp.path.step.is_path_finalized(directory / str(step))]
    return found


def list_steps(directory: storage.Path) -> list[int]:
    """Returns the steps with a checkpoint; a directory that is not there has none.

    Raises:
      InputError: other processes find other ones, or it is not a folder.
      TransientError: the disk does not answer, or a permission is missing.
    """
    try:
        steps = steps_in(directory)
    except OSError as error:
        reason = error.strerror or brief(error)
        kind = InputError if error.errno in (errno.ELOOP, errno.ENOTDIR) else TransientError
        raise kind(f"{directory} cannot be read now ({reason})") from error
    hosts.compare("the list of checkpoints", {f"steps in {directory}": steps})
    return steps


def newest_readable(
    directory: storage.Path,
    read: Callable[[storage.Path], tuple[Any, Any]],
    check: Callable[[Any, list[Any]], None],
    *,
    set_aside: bool,
) -> tuple[int, Any] | None:
    """Reads the newest checkpoint that every process can read.

    Newer ones are named in a warning and, once an older one has been read, renamed.

    Args:
      directory: with one folder a step.
      read: returns the content of a step's folder, and what the other processes should know of it,
        as JSON has it; alone, without waiting for them.
      check: raises ValueError where the content is wrong, given what all processes say of it.
      set_aside: renames what cannot be read to STEP.unreadable, so that its step can be saved anew
        and nothing is lost.

    Returns:
      The step and its content, or None without any checkpoint.

    Raises:
      InputError: there are checkpoints, but none that can be read; or what `read` raises.
      TransientError: the disk does not answer, or a permission is missing.
    """
    unreadable = []
    for step in reversed(list_steps(directory)):
        folder = directory / str(step)
        content, problem = _try(read, check, folder)
        if problem is None:
            break
        unreadable.append((folder, problem))
    else:
        if not unreadable:
            return None
        folder, problem = unreadable[0]
        raise InputError(
            f"{folder} cannot be read ({problem}), and there is no older checkpoint that can; "
            "put a copy in its place, or choose another --workdir to start anew"
        )
    for folder, problem in unreadable:
        kept = f"; it stays as {_rename(folder)}" if set_aside else ""
        warning = f"warning: {folder} cannot be read ({problem}); using step {step} instead{kept}"
        log(warning, on=hosts.is_first())
    return step, content


def _try(
    read: Callable[[storage.Path], tuple[Any, Any]],
    check: Callable[[Any, list[Any]], None],
    folder: storage.Path,
) -> tuple[Any, str | None]:
    """The content, and what is wrong with `folder`, if anything, on one of the processes.

    All of them learn of each other's errors: none must wait for one that has failed.
    """
    content = None
    try:
        content, mine = read(folder)
        outcome = f"Read {json.dumps(mine)}"
    except InputError as error:  # it can be read, but does not fit
        outcome = f"InputError {error}"
    except Exception as error:
        number = couplings.system_errno(error)
        if number is not None and number not in _DAMAGE:
            outcome = (
                f"TransientError {folder} cannot be read now ({os.strerror(number)}); mend that, "
                "or move it away to go on from the checkpoint before it"
            )
        elif couplings.is_unreadable(error):
            outcome = f"Damage {brief(error.__cause__ or error)}"
        else:
            raise
    said = hosts.gather(f"the reading of {folder}", outcome, seconds=hosts.LONG_SECONDS)
    outcomes = [(kind, text) for kind, _, text in (each.partition(" ") for each in said)]
    for kind in (TransientError, InputError):
        if texts := [text for name, text in outcomes if name == kind.__name__]:
            raise kind(max(texts))
    if texts := [text for name, text in outcomes if name == "Damage"]:
        return None, max(texts)
    try:
        check(content, [json.loads(text) for _, text in outcomes])
    except ValueError as error:
        return None, brief(error)
    return content, None


def _rename(folder: storage.Path) -> str:
    """Renames, on process 0, to a name that Orbax takes for no checkpoint; returns it."""
    for number in itertools.count(1):
        aside = folder.with_name(f"{folder.name}.unreadable" + (f".{number}" if number > 1 else ""))
        if not aside.exists():
            break
    hosts.gather("the renaming", "")  # before any process has looked for the name
    if hosts.is_first():
        folder.rename(aside)
    hosts.gather("the renaming", "")
    deadline = time.monotonic() + hosts.LAG_SECONDS
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(1)
    return aside.name
