"""What the tests of the commands share."""

from typing import NamedTuple

import pytest

from deit_jax import console
from deit_jax.cli.main import main


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def deit_jax_command(capsys, monkeypatch, tmp_path):
    """Runs a command in this process, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "_PATIENCE", 600)  # a slow machine says what it waits for

    def run(*arguments, **options):
        return Ended(main(list(map(str, arguments)), **options), *capsys.readouterr())

    return run
