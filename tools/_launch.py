"""Starts a command of the clone that this file is in, from any working folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def launch(command: str) -> None:
    """Ends with the status of `deit-jax COMMAND` with this process's flags."""
    from deit_jax.cli.main import main

    sys.exit(main([command, *sys.argv[1:]]))
