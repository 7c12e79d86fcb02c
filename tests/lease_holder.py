"""Holds a workdir's lease until it is killed or interrupted: a run that does not train.

python -m tests.lease_holder WORKDIR MACHINE GO

It waits for the file GO before it starts. MACHINE takes the place of this machine's name, so that
processes of this machine know as little of each other as those of several that share a disk.
"""

import signal
import sys
import time
from pathlib import Path

from deit_jax.cli import run
from deit_jax.errors import InputError
from deit_jax.parallel import holders, lease

TIMES = {"RENEW": 0.2, "WATCH": 2, "LOOK": 0.1}  # seconds
SCRIPT = Path(__file__).resolve()


def main(workdir: str, machine: str, go: str) -> None:
    """Prints "held", and the line with which it ends."""
    # What starts the tests may ignore Ctrl-C, as a shell does for its background jobs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    lease.RENEW_SECONDS, holders.WATCH_SECONDS, holders.LOOK_SECONDS = TIMES.values()
    if machine:
        holders.machine = lambda: machine
    print("ready", flush=True)
    while not Path(go).exists():
        time.sleep(0.001)
    try:
        importing = run._handlers({signal.SIGTERM: (signal.SIG_DFL, run._stop_alone)})
        with importing, run._signals_end_at_once(), lease.held(workdir) as hold:
            print("held", flush=True)
            while True:
                hold.check()
                time.sleep(0.05)
    except InputError as error:
        print(f"{type(error).__name__} {error}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
