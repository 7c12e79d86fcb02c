"""A bug keeps its traceback: on the terminal, and of a run in its folder; a mistake is one line."""

import contextlib
import errno

import pytest

from deit_jax import storage
from deit_jax.cli import crash
from deit_jax.errors import InputError, TransientError, is_bug
from deit_jax.parallel import hosts
from deit_jax.planning import forecast
from deit_jax.training import loop


@pytest.fixture
def broken_run(deit_jax_command, tmp_path, monkeypatch):
    """Runs a command whose work raises the given error; returns how it ended and what is kept."""

    def run(error, command="train", workdir=tmp_path / "run"):
        def work(*_):
            raise error

        monkeypatch.setattr(loop, "train", work)
        monkeypatch.setattr(loop, "evaluate", work)
        monkeypatch.setattr(forecast, "plan", work)
        flags = (command, "--config=digits", f"--workdir={workdir}")
        ended = None
        with contextlib.suppress(type(error)):
            ended = deit_jax_command(*flags)
        return ended, sorted(tmp_path.glob("run/error-*.txt"))

    return run


@pytest.mark.parametrize("command", ["train", "eval"])
@pytest.mark.parametrize(
    "error", [KeyError("x"), ValueError("ours"), RuntimeError(), OSError("odd")]
)
def test_the_traceback_of_a_bug_is_kept(broken_run, capsys, error, command):
    ended, (file,) = broken_run(error, command)
    assert ended is None, "Python prints the traceback"
    text = file.read_text()
    assert f"deit-jax {command} --config=digits --workdir=" in text.splitlines()[0]
    assert text.count("Traceback (most recent call last)") == 1
    assert "in work\n    raise error\n" in text
    assert type(error).__name__ in text.splitlines()[-1]
    assert "jax 0." in text


def test_a_full_disk_is_a_line_and_keeps_its_traceback(broken_run):
    ended, (file,) = broken_run(OSError(errno.ENOSPC, "No space left on device"))
    assert ended.status == 1
    first, second = ended.err.splitlines()
    assert first == f"the traceback is also in {file}"
    assert second == "error: [Errno 28] No space left on device"


@pytest.mark.parametrize("error", [InputError("x"), TransientError("x"), KeyboardInterrupt()])
def test_an_expected_error_leaves_no_file(broken_run, error):
    ended, kept = broken_run(error)
    assert not kept
    assert ended.err.count("\n") == 1


def test_a_plan_writes_nothing(broken_run):
    assert broken_run(KeyError("x"), "plan") == (None, [])


def test_what_cannot_be_written_hides_nothing(broken_run, tmp_path):
    (tmp_path / "file").touch()
    assert broken_run(KeyError("x"), workdir=tmp_path / "file" / "run") == (None, [])


def test_each_process_has_a_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "count", lambda: 3)
    for number in range(3):
        monkeypatch.setattr(hosts, "index", lambda number=number: number)
        crash.keep(KeyError("\ud800"), str(tmp_path), "a command", hosts.label())
    names = sorted(file.stem.rpartition("-process-")[2] for file in tmp_path.iterdir())
    assert names == ["0", "1", "2"]


@pytest.mark.slow
def test_in_a_bucket():
    from tests import bucket

    with bucket.in_this_process():
        file = crash.keep(KeyError("x"), f"gs://{bucket.NAME}/run", "a command", "")
        assert file.startswith(f"gs://{bucket.NAME}/run/error-")
        assert "KeyError: 'x'" in storage.path_of(file).read_text()


def test_bugs_are_told_from_what_libraries_raise():
    bugs = [TypeError(), AttributeError(), NameError(), KeyError(), IndexError(), AssertionError()]
    assert all(map(is_bug, bugs))
    assert not any(map(is_bug, [OSError(), ValueError(), RuntimeError(), InputError("x")]))
