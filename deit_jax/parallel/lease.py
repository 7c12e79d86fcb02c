"""The lease of a workdir: one run at a time writes to it, and a dead one loses it.

The holder renews a counter in WORKDIR/.lease.N.json. No clocks are compared and no locks of file
systems are used, so it holds on NFS and in buckets too. A start that finds such a file asks its own
machine whether the process lives, if it is one of this machine; else it watches the counter, and
takes a holder whose counter stands still for dead. Then it creates the file of the next number,
which succeeds for exactly one of those who try. What its listing did not show yet is there once its
own file is; it then withdraws and looks again.
"""

import contextlib
import functools
import json
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator

from deit_jax import storage
from deit_jax.errors import InputError, TransientError, brief
from deit_jax.parallel import holders, hosts

RENEW_SECONDS = 5
_TRIES = 20
_RELEASE_SECONDS = 5  # that the end of a process waits for a disk that does not answer


class Lease:
    """A workdir that this run holds, renewed in a thread of its own; see `held`.

    Attributes:
      lost: whether the workdir is known to be another run's, or gone; on process 0 alone.
    """

    def __init__(self, workdir: str):
        self._workdir, self._folder = workdir, storage.path_of(workdir)
        self._id, self._path = secrets.token_hex(8), self._folder
        self._record = {"id": self._id, **holders.this_process(), "renewed": 0}
        self._made: list[storage.Path] = []  # folders, the innermost first
        self._ended, self.lost, self._seen = threading.Event(), False, 0.0
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def check(self) -> None:
        """Makes sure that the workdir is still ours; every process of a run does, before it writes.

        Raises:
          TransientError: another run has taken it over, as this one was suspended or cut off.
          InputError: the workdir is gone: deleted, moved or unmounted.
        """
        _together(functools.partial(self.check_here, now=True))

    def check_here(self, *, now: bool = False) -> None:
        """`check` of this process alone, as process 0; looks after some seconds, or `now`."""
        if not hosts.is_first():
            return
        if not self.lost and not now and time.monotonic() - self._seen < RENEW_SECONDS:
            return
        begin = time.monotonic()
        try:
            content = holders.read(self._path)
        except Exception as error:  # gcsfs raises those of several libraries
            raise TransientError(f"{self._path} cannot be read now ({brief(error)})") from error
        if content is None or self._id.encode() not in content:
            self.lost = True
            raise self._loss()
        self._seen = begin

    def _loss(self) -> InputError:
        for path in holders.files(self._folder):
            other = holders.describe(holders.read(path))
            return TransientError(
                f"--workdir={self._workdir} was taken over by {other}, while this one was "
                "suspended or cut off from it; this one writes no more"
            )
        return InputError(
            f"--workdir={self._workdir} is gone (its {self._path.name} is no longer there): was it "
            "deleted, moved or unmounted? nothing more is written there; bring it back and run the "
            "same command to go on from its last checkpoint"
        )

    def take(self) -> None:
        """Waits for a dead holder to lose it; raises TransientError where one lives."""
        holders.held_here[self._id] = self  # before another thread finds the file
        try:
            if not storage.is_remote(self._folder):
                self._made = [p for p in (self._folder, *self._folder.parents) if not p.exists()]
            for _ in range(_TRIES):
                if self._try():
                    break
                time.sleep(random.uniform(0, holders.LOOK_SECONDS))
            else:
                raise TransientError(f"--workdir={self._workdir}: too many start there at once")
        except BaseException:
            self.release()
            raise
        self._seen = time.monotonic()
        self._thread.start()

    def _try(self) -> bool:
        dead = holders.wait_until_dead(self._workdir, self._folder)
        numbers = [int(holders.FILE.fullmatch(path.name)[1]) for path in dead]
        path = self._folder / f".lease.{max(numbers, default=0) + 1}.json"
        if not storage.is_remote(path):
            self._folder.mkdir(parents=True, exist_ok=True)
        if not storage.create(path, self._text()):
            return False
        self._path = path
        for other in holders.files(self._folder):
            if other != path and holders.read(other) not in (None, dead.get(other)):
                storage.remove_file(path)
                return False
        for other in dead:
            storage.remove_file(other)
        return True

    def _text(self) -> bytes:
        return json.dumps(self._record).encode()

    def _renew(self) -> None:
        while not self.lost and not self._ended.wait(RENEW_SECONDS):
            begin = time.monotonic()
            self._record["renewed"] += 1
            try:
                self.lost = not storage.rewrite(self._path, self._id.encode(), self._text())
                self._seen = begin
            except Exception:  # it may answer the next time; `check` tells
                continue

    def release(self) -> None:
        """Gives the workdir back; a second time it does nothing."""
        self._ended.set()
        if holders.held_here.pop(self._id, None) is None:
            return
        if self._thread.is_alive():  # Python's end would break into TensorStore's call
            self._thread.join(_RELEASE_SECONDS)
        with contextlib.suppress(Exception):  # another start finds that this process is dead
            if self._path != self._folder and self._id.encode() in holders.read(self._path):
                storage.remove_file(self._path)
            for folder in self._made:  # a refused run leaves nothing behind
                folder.rmdir()


@contextlib.contextmanager
def held(workdir: str) -> Iterator[Lease]:
    """Holds the lease of `workdir` within a `with` block; every process of a run enters it.

    Raises:
      TransientError: another run holds it. It may end, so that a retry may succeed.
      InputError: the workdir cannot be made or be written.
    """
    lease = Lease(workdir)

    def take() -> None:
        try:
            lease.take()
        except InputError:
            raise
        except Exception as error:  # gcsfs raises those of several libraries
            reason = getattr(error, "strerror", None) or brief(error)
            raise InputError(f"--workdir={workdir} cannot be written ({reason})") from error

    try:
        _together(take)
        yield lease
    finally:
        lease.release()


def release_all() -> None:
    """Gives back what this process holds, before it ends without unwinding; waits for seconds."""
    for lease in list(holders.held_here.values()):
        thread = threading.Thread(target=lease.release, daemon=True)
        thread.start()
        thread.join(_RELEASE_SECONDS)


def is_held(workdir: str) -> bool:
    """Returns whether there is a lease, perhaps of a dead run."""
    return bool(holders.files(storage.path_of(workdir)))


def _together(act: Callable[[], None]) -> None:
    """Acts on process 0, and raises its InputError on every process."""
    problem = ""
    if hosts.is_first():
        try:
            act()
        except InputError as error:
            if not hosts.several():
                raise
            problem = f"{type(error).__name__} {error}"
    kind, _, text = hosts.gather("the lease of the workdir", problem)[0].partition(" ")
    if kind:
        raise (TransientError if kind == "TransientError" else InputError)(text)
