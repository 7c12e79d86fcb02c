"""A file that grows while a run goes on, on a disk or in a bucket."""

import os
import time
from collections.abc import Callable

from deit_jax import storage
from deit_jax.errors import TransientError, brief

_UPLOAD_SECONDS = 30


class LogFile:
    """Appends to a file. A bucket cannot: there, the whole file is written again now and then.

    That is when 30 seconds have passed, before each checkpoint, and at the end. Lines that a kill
    loses stand after the checkpoint from which the run goes on, and so are written again.
    """

    def __init__(self, path: storage.Path, check: Callable[[], None] = lambda: None):
        """Opens the file, which may exist; `check` raises where it must not be written any more."""
        self._path, self._file, self._check = path, None, check
        if storage.is_remote(path):
            self._content = path.read_bytes() if path.exists() else b""
            self._due = 0.0
        else:
            path.parent.mkdir(parents=True, exist_ok=True)  # an evaluation makes none before
            self._file = path.open("ab")

    def write(self, data: bytes) -> None:
        """Appends."""
        if self._file is None:
            self._content += data
        else:
            self._file.write(data)

    def flush(self) -> None:
        """Shows others what has been written; in a bucket, only when it is due."""
        if self._file is not None:
            self._file.flush()
        elif time.monotonic() > self._due:
            self.sync()

    def sync(self) -> None:
        """Waits until all is stored.

        Raises:
          TransientError: the bucket does not take it.
        """
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            return
        self._check()
        try:
            self._path.write_bytes(self._content)
        except Exception as error:  # gcsfs raises those of several libraries
            raise TransientError(f"{self._path} cannot be written ({brief(error)})") from error
        self._due = time.monotonic() + _UPLOAD_SECONDS

    def close(self) -> None:
        """Stores what is left."""
        if self._file is None:
            self.sync()
        else:
            self._file.close()
