"""tools/until_done.sh repeats a run until it is finished, and only then."""

import os
import signal
import subprocess
import time

import pytest

# Each stands for a start of the run: told to stop, crashed, finished; LATE is a run that another
# host has finished, whose model takes a while to be seen here.
LATE = "echo 'mkdir -p run/model; touch run/model/model.json' > on_sleep; exit 0"
STOPPED, CRASHED, MISTAKE = "exit 0", "exit 1", "exit 2"
FINISHED = "mkdir -p run/model; touch run/model/model.json; exit 0"
WAITS = "trap 'echo told >> starts; exit 0' TERM; for i in $(seq 100); do /bin/sleep 0.1; done"


@pytest.fixture
def script(tmp_path, repo_root):
    """A function that runs the script where `python` takes the given courses, one a start."""

    def run(*courses, flags=("--workdir=run",)):
        commands = tmp_path / "bin"
        commands.mkdir()
        cases = "".join(f"{number}) {text} ;;\n" for number, text in enumerate(courses, 1))
        python = f'#!/bin/bash\necho "$@" >> starts\ncase $(wc -l < starts) in\n{cases}esac\n'
        for name, text in (
            ("python", python),
            ("sleep", "#!/bin/bash\n[ -e on_sleep ] && . ./on_sleep"),
        ):
            (commands / name).write_text(text)
            (commands / name).chmod(0o755)
        return subprocess.Popen(
            ["bash", repo_root / "tools" / "until_done.sh", *flags],
            cwd=tmp_path,
            env=os.environ | {"PATH": f"{commands}:{os.environ['PATH']}"},
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


@pytest.mark.parametrize(
    ("courses", "flags", "status", "starts"),
    [
        ((CRASHED, STOPPED, FINISHED), ("--workdir=run", "--x"), 0, 3),
        ((STOPPED, FINISHED), ("--once", "--workdir=run"), 75, 1),
        ((CRASHED, FINISHED), ("--once", "--workdir=run"), 1, 1),
        ((FINISHED,), ("--once", "--workdir=run"), 0, 1),
        ((LATE, FINISHED), ("--workdir=run",), 0, 1),
        ((MISTAKE, FINISHED), ("--workdir=run",), 2, 1),
    ],
)
def test_status_and_starts(script, tmp_path, courses, flags, status, starts):
    assert script(*courses, flags=flags).wait(30) == status
    lines = (tmp_path / "starts").read_text().splitlines()
    assert len(lines) == starts
    expected = " ".join(flag for flag in flags if flag != "--once")
    assert all(line.endswith(f"main.py {expected}") for line in lines)


def test_sigterm_reaches_the_run_and_ends_the_repetition(script, tmp_path):
    process = script(WAITS, FINISHED)
    starts = tmp_path / "starts"
    while not starts.exists():
        time.sleep(0.05)
    time.sleep(0.3)  # for the trap of the run
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75
    assert starts.read_text().splitlines()[1:] == ["told"]


def test_a_workdir_is_needed(script):
    process = script(FINISHED, flags=("--config=x.py",))
    assert process.wait(30) == 2
    assert "--workdir=DIR is missing" in process.stderr.read()
