"""What the tests of the commands share."""

from typing import NamedTuple

import pytest

from deit_jax.cli.main import main


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def deit_jax_command(capsys, monkeypatch, repo_root):
    """Runs a command in this process, in the repository's root."""

    def run(*arguments, **options):
        with monkeypatch.context() as patch:
            patch.chdir(repo_root)
            status = main(list(map(str, arguments)), **options)
        return Ended(status, *capsys.readouterr())

    return run
