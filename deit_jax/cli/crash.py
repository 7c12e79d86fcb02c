"""Keeps the traceback of a bug in the folder of the run that it ended."""

import contextlib
import datetime
import os
import platform
import socket
import traceback
from importlib.metadata import PackageNotFoundError, version

from deit_jax import __version__, storage

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow", "numpy")


def keep(error: BaseException, workdir: str, command_line: str, label: str) -> str | None:
    """Writes WORKDIR/error-TIME.txt: the command, the versions and the traceback.

    Args:
      error: the bug.
      workdir: folder of the run, which may be in a bucket, or not be there yet.
      command_line: as it was given.
      label: names the process, of several; "" for one that is alone.

    Returns:
      The file, or None where it cannot be written: the error itself matters more.
    """
    now = datetime.datetime.now(datetime.UTC)
    process = "-".join(["", *label.rstrip(": ").split()[:2]])  # "process 1 of 4: "
    name = f"error-{now:%Y%m%d-%H%M%S-%f}{process}.txt"
    text = "".join(
        (
            f"{command_line}\n{now:%Y-%m-%d %H:%M:%S} UTC, {socket.gethostname()}, ",
            f"process {os.getpid()}\ndeit-jax {__version__}, Python {platform.python_version()}, ",
            f"{', '.join(map(_version, _PACKAGES))}\n\n",
            *traceback.format_exception(error),
        )
    )
    with contextlib.suppress(Exception):  # of whatever kind: it must not hide the first one
        folder = storage.path_of(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode("utf-8", "backslashreplace"))
        return f"{folder / name}"
    return None


def _version(package: str) -> str:
    with contextlib.suppress(PackageNotFoundError):
        return f"{package} {version(package)}"
    return f"no {package}"
