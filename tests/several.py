"""Runs of main.py in several processes on this machine, for tests and for tests/chaos.py."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def image_recipe(root: Path, *, num_eval: int) -> list[str]:
    """Flags for six steps on small images in a new folder, with everything random."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 150), ("val", num_eval)):
        for number in range(count):
            folder = root / split / ("bird", "boat", "dog")[number % 3]
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            image.save(folder / f"{number}.png")
    return [
        "--config=configs/digits.py",
        "--config.dataset.source=folder",
        f"--config.dataset.root={root}",
        "--config.dataset.eval_split=val",
        "--config.schedule.epochs=2",
        "--config.schedule.warmup_epochs=1",
        "--config.mixing.random_erasing=0.25",
        "--config.mixing.group_size=2",
        "--config.model.drop_path_rate=0.1",
        "--config.train.batch_size=48",
        "--config.train.log_every_steps=1",
        "--config.train.eval_every_epochs=0",
        "--config.checkpoint.every_epochs=0",
    ]


class Process:
    """One process of a run, with its output in files, so that no pipe ever fills up."""

    def __init__(self, script: Path | str, flags: list[str], env: dict[str, str]):
        self._out = tempfile.TemporaryFile()  # noqa: SIM115
        self._err = tempfile.TemporaryFile()  # noqa: SIM115
        self._popen = subprocess.Popen(
            [sys.executable, script, *map(str, flags)],
            cwd=ROOT,
            # With the fault handler a process that is aborted says where its threads stand.
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"} | env,
            stdout=self._out,
            stderr=self._err,
        )

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def stdout(self) -> str:
        return _text(self._out)

    @property
    def stderr(self) -> str:
        return _text(self._err)

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    @property
    def returncode(self) -> int | None:
        return self._popen.poll()

    def send(self, signal_number: int) -> None:
        self._popen.send_signal(signal_number)

    def wait(self, seconds: float) -> int:
        """The exit status; a process that is still running then is ended, and the test fails."""
        try:
            return self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGABRT)
            self._popen.wait()
            raise AssertionError(f"still running:\n{self.stdout}\n{self.stderr}") from None

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Until the process has printed it."""
        deadline = time.monotonic() + seconds
        while text not in self.stdout:
            assert self.running, f"ended without {text!r}:\n{self.stdout}\n{self.stderr}"
            assert time.monotonic() < deadline, f"no {text!r}:\n{self.stdout}\n{self.stderr}"
            time.sleep(0.05)

    def kill(self) -> None:
        if self.running:
            self._popen.kill()
        self._popen.wait()


def _text(file: object) -> str:
    # By its own position: the file's is the one at which the process writes.
    return os.pread(file.fileno(), 2**24, 0).decode(errors="replace")


@contextlib.contextmanager
def started(
    flags: list[str],
    *,
    processes: int,
    devices: int | Sequence[int] = 1,
    own_flags: dict[int, list[str]] | None = None,
    own_env: dict[int, dict[str, str]] | None = None,
    detected: bool = False,
    script: Path | str = "main.py",
) -> Iterator[list[Process]]:
    """The processes of one run, `devices` CPU devices each; those left at the end are killed.

    Args:
      flags: of every process.
      processes: how many; of one alone nothing is said about it.
      devices: of each.
      own_flags: more flags, for the process of that number.
      own_env: more environment variables, likewise.
      detected: the environment says which processes there are, not flags.
      script: what to run, with main.py's flags.
    """
    address = f"127.0.0.1:{free_port()}"
    running: list[Process] = []
    try:
        for index in range(processes):
            mine = [*flags, *(own_flags or {}).get(index, ())]
            if processes > 1 and not detected:
                mine += [
                    f"--config.distributed.coordinator_address={address}",
                    f"--config.distributed.num_processes={processes}",
                    f"--config.distributed.process_id={index}",
                ]
            count = devices if isinstance(devices, int) else devices[index]
            env = {"JAX_NUM_CPU_DEVICES": str(count)}
            running.append(Process(script, mine, env | (own_env or {}).get(index, {})))
        yield running
    finally:
        for process in running:
            process.kill()


def run(flags: list[str], *, seconds: float = 300, **options: object) -> list[Process]:
    """`started`, to the end of every process."""
    with started(flags, **options) as processes:
        deadline = time.monotonic() + seconds
        for process in processes:
            process.wait(max(1.0, deadline - time.monotonic()))
    return processes
