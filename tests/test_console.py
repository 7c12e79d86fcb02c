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


ODD = "a\x1b[2Jb\rc\x9bd\x07\u202ee\x7f"


def test_control_characters_do_nothing_to_a_terminal(capsys):
    console.log(f"{ODD}\n\tü 鳥 ×")
    console.log_error(ODD)
    out, err = capsys.readouterr()
    harmless = r"a\x1b[2Jb\rc\x9bd\x07\u202ee\x7f"
    assert (out, err) == (f"{harmless}\n\tü 鳥 ×\n", f"{harmless}\n")
    assert console.escaped("a\nb\tc", one_line=True) == r"a\nb\tc"
