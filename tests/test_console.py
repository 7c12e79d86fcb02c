"""What the console shows while something takes its time; tests of recovery close the terminal."""

import time

from deit_jax import console


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
