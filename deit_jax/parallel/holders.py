"""Who holds a workdir: reads its leases, and tells living holders from dead ones."""

import contextlib
import errno
import functools
import os
import re
import socket
import time
from typing import Any

from deit_jax import storage
from deit_jax.console import log
from deit_jax.errors import TransientError

WATCH_SECONDS = 30  # a holder may be late: a busy disk, a long call that keeps Python's lock
LOOK_SECONDS = 1
FILE = re.compile(r"\.lease\.(\d{1,9})\.json")
held_here: dict[str, Any] = {}  # the leases of this process by their ids


def wait_until_dead(workdir: str, folder: storage.Path) -> dict[storage.Path, bytes | None]:
    """Returns the leases of dead holders; raises TransientError where one lives."""
    watched: dict[storage.Path, bytes] = {}
    deadline = last = 0.0
    while True:
        found = {path: read(path) for path in files(folder)}  # None: gone since, or a dead link
        lives = {path: c is not None and _lives(c) for path, c in found.items()}
        for path, content in found.items():
            if lives[path] or (lives[path] is None and watched.get(path, content) != content):
                raise TransientError(
                    f"--workdir={workdir} is in use by {describe(content)}; wait until that ends, "
                    "stop it, or choose another --workdir"
                )
        new = [path for path in found if lives[path] is None and path not in watched]
        now = time.monotonic()
        if new or now - last > WATCH_SECONDS / 3:  # the disk did not answer, perhaps not to both
            deadline = now + WATCH_SECONDS
        last = now
        if new:
            watched |= {path: found[path] for path in new}
            log(
                f"{workdir} was in use by {describe(found[new[0]])}: waiting {WATCH_SECONDS} s to "
                "see whether that still runs"
            )
        if None not in lives.values() or now >= deadline:
            return found
        time.sleep(LOOK_SECONDS)


def _lives(content: bytes) -> bool | None:
    """Returns whether the holder of a lease lives; None for one of another machine or container."""
    record = _parse(content)
    pid = record.get("pid")
    if not machine() or record.get("machine") != machine() or not isinstance(pid, int):
        return None
    if pid == os.getpid():  # an earlier run of this process, one of its threads, or the same number
        return record.get("id") in held_here
    state, started = state_of(pid)
    if state:
        return state not in ("Z", "X") and started == record.get("started")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return None  # it is there, but hidden from us


def this_process() -> dict[str, object]:
    """Returns what a lease says of its holder."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "machine": machine(),
        "started": state_of(os.getpid())[1],
    }


def state_of(pid: int) -> tuple[str, str]:
    """Returns the state of a process, Z for one that has ended, and when it started, if known."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return "", ""


@functools.cache
def machine() -> str:
    """Names this start of this machine, and the container that numbers its processes; or ""."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def files(folder: storage.Path) -> list[storage.Path]:
    """Returns the leases in a workdir."""
    try:
        return sorted(path for path in folder.iterdir() if FILE.fullmatch(path.name))
    except (FileNotFoundError, NotADirectoryError):
        return []


def read(path: storage.Path) -> bytes | None:
    """Returns the content of a lease, or None where it is gone."""
    try:
        return storage.read_bytes(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ESTALE):
            return None
        raise


def _parse(content: bytes) -> dict:
    with contextlib.suppress(ValueError):
        record = storage.parse_json(content)
        if isinstance(record, dict):
            return record
    return {}


def describe(content: bytes | None) -> str:
    """Returns in a few words whose lease it is."""
    record = _parse(content or b"")
    if not record:
        return "another process"
    text = "process {pid:.20} on {host:.80} since {since:.40}"
    text = text.format(**{name: str(record.get(name)) for name in ("pid", "host", "since")})
    return "".join(c if c.isprintable() else "?" for c in text)
