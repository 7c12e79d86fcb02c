"""What the console shows while something takes its time, and where nobody reads it."""

import os
import subprocess
import sys
import time

import pytest

from deit_jax import console
from tests import several


def test_what_takes_long_is_named(monkeypatch, capsys):
    monkeypatch.setattr(console, "_PATIENCE", 0.05)
    with console.doing("quick"):
        pass
    with console.doing("slow", on=False):
        time.sleep(0.2)
    assert capsys.readouterr().out == ""
    with console.doing("compiling"):
        time.sleep(0.5)
    assert capsys.readouterr().out == "compiling …\n"


ODD = "a\x1b[2Jb\rc\x9bd\x07\u202ee\x7f"


def test_control_characters_do_nothing_to_a_terminal(capsys):
    console.log(f"{ODD}\n\tü 鳥 ×")
    console.log_error(ODD)
    out, err = capsys.readouterr()
    harmless = r"a\x1b[2Jb\rc\x9bd\x07\u202ee\x7f"
    assert (out, err) == (f"{harmless}\n\tü 鳥 ×\n", f"{harmless}\n")
    assert console.escaped("a\nb\tc", one_line=True) == r"a\nb\tc"


@pytest.mark.parametrize(
    "output", [">/dev/full 2>/dev/full", ">&- 2>&-", "2>/dev/full", "> >(true) 2> >(true)"]
)
def test_nobody_reads_what_it_prints(output):
    """Nor is there room: the run goes on, and ends as one that is read, with all its last lines."""
    script = (
        "import time; from deit_jax.console import log, log_error; time.sleep(0.5)\n"
        "for number in range(1000): log(f'line {number}'); log_error('two')"
    )
    command = f'exec "$0" -c "$1" {output}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, script],
        cwd=several.ROOT,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        timeout=60,
    )
    assert done.returncode == 0
