"""Full disks, read-only folders, damaged checkpoints, SIGTERM at a bad time: nothing is lost."""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest

from configs import digits
from deit_jax.checkpoints import model_folder, recovery
from deit_jax.checkpoints.training import TrainCheckpoints
from deit_jax.errors import InputError, TransientError
from deit_jax.training import checks, loop
from tests import kill_and_resume, several, small_main
from tests.checkpoints.test_checkpoint import _abstract, _assert_equal, _save, _state

DELETE, CUT = "delete", "cut"


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A workdir with checkpoints 1, 2 and 3, the last one with metrics; its info and its states."""
    workdir = tmp_path_factory.mktemp("three")
    states = {step: _state(seed=step)[1] for step in (1, 2, 3)}
    info = _state()[0]
    with contextlib.closing(TrainCheckpoints(workdir, keep=3)) as checkpoints:
        for step, state in states.items():
            _save(checkpoints, info, state, step, top1=10.0 if step == 3 else None)
    return workdir, info, states


@pytest.fixture
def workdir(three, tmp_path):
    """A copy of it, to be spoilt."""
    shutil.copytree(three[0], tmp_path / "run")
    return tmp_path / "run"


def spoil(file, how):
    if how == DELETE:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def restored(workdir, like, **options):
    """The step to resume at, and its state."""
    with contextlib.closing(TrainCheckpoints(workdir, keep=3, **options)) as checkpoints:
        return checkpoints.latest_step(), checkpoints.restore(_abstract(like))[0]


def test_any_file_damaged_costs_one_checkpoint_at_most(three, tmp_path, capsys):
    """Each file of the newest one, deleted and cut: it is read all the same, or the one before."""
    source, _, states = three
    newest = source / "checkpoints" / "3"
    files = [path.relative_to(source) for path in newest.rglob("*") if path.is_file()]
    fell_back = set()
    for file in files:
        for how in (DELETE, CUT):
            copy = tmp_path / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(source, copy)
            spoil(copy / file, how)
            step, state = restored(copy, states[1])
            _assert_equal(state, states[step])
            printed = capsys.readouterr().out
            if step == 3:
                assert printed == ""
                continue
            assert step == 2
            (line,) = printed.splitlines()
            assert line.startswith(f"warning: {copy / 'checkpoints' / '3'} cannot be read (")
            assert line.endswith("; using step 2 instead; it stays as 3.unreadable")
            assert (copy / "checkpoints" / "3.unreadable").is_dir()
            fell_back.add((file.name, how))
    assert {"_METADATA", "_CHECKPOINT_METADATA", "metadata", "manifest.ocdbt"} <= {
        name for name, how in fell_back if how == CUT
    }
    assert any(len(name) == 32 for name, _ in fell_back), "no file with arrays mattered"


def test_what_was_set_aside_is_kept_and_its_step_saved_anew(three, workdir):
    _, info, states = three
    for again in ("", ".2"):
        spoil(workdir / "checkpoints" / "3" / "state" / "manifest.ocdbt", CUT)
        with contextlib.closing(TrainCheckpoints(workdir, keep=3)) as checkpoints:
            assert checkpoints.latest_step() == 2
            _save(checkpoints, info, states[2], 3)
        assert (workdir / "checkpoints" / f"3.unreadable{again}" / "state").is_dir()
        step, state = restored(workdir, states[1])
        assert step == 3
        _assert_equal(state, states[2])


def test_evaluation_changes_nothing(three, workdir, capsys):
    """A run may go on meanwhile: what cannot be read is passed over, and stays where it is."""
    spoil(workdir / "checkpoints" / "3" / "meta" / "metadata", DELETE)
    step, state = restored(workdir, three[2][1], set_aside=False)
    assert step == 2
    _assert_equal(state, three[2][2])
    assert capsys.readouterr().out.endswith("using step 2 instead\n")
    assert (workdir / "checkpoints" / "3").is_dir()


def test_no_checkpoint_that_can_be_read_is_an_error(workdir):
    """Never from scratch in silence: nothing is renamed either."""
    for step in ("1", "2", "3"):
        spoil(workdir / "checkpoints" / step / "state" / "_METADATA", CUT)
    with pytest.raises(InputError, match="and there is no older checkpoint that can") as caught:
        TrainCheckpoints(workdir, keep=3)
    assert str(workdir / "checkpoints" / "3") in str(caught.value)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["1", "2", "3"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_disk_that_does_not_answer_is_no_damage(three, workdir, monkeypatch, capsys, number):
    """Nothing is set aside: it is tried again, and then left to whoever starts the run."""
    failures = []
    opened = recovery._open

    def refuse(*arguments):
        if failures:
            failures.pop()
            raise OSError(number, "as the system says")
        return opened(*arguments)

    monkeypatch.setattr(recovery, "_open", refuse)
    monkeypatch.setattr(recovery, "_PAUSE_SECONDS", 0)
    failures += [1, 2]
    assert restored(workdir, three[2][1])[0] == 3
    failures += [1, 2, 3]
    with pytest.raises(TransientError) as caught:
        TrainCheckpoints(workdir, keep=3)
    assert str(caught.value) == (
        f"{workdir / 'checkpoints' / '3'} cannot be read now ({os.strerror(number)}); mend that, "
        "or move it away to go on from the checkpoint before it"
    )
    monkeypatch.setattr(recovery.os, "listdir", refuse)
    failures += [1, 2, 3]
    with pytest.raises(
        TransientError, match=r"checkpoints cannot be read now .*; mend that and start"
    ):
        TrainCheckpoints(workdir, keep=3)
    monkeypatch.undo()
    assert capsys.readouterr().out == ""
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["1", "2", "3"]


def test_a_mistake_in_the_check_is_not_taken_for_damage(three, monkeypatch):
    monkeypatch.setattr(recovery, "_open", lambda *_: jax.no_such_name)
    with pytest.raises(AttributeError):
        recovery.find_damage(three[0] / "checkpoints" / "3")


# The disk


@pytest.fixture
def small_disk(tmp_path):
    """A disk with room for a few checkpoints of the digits; only root may mount one."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(mount)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a disk is not permitted here")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


SHORT = [
    "--config=configs/digits.py", "--config.schedule.epochs=1",
    "--config.schedule.warmup_epochs=0", "--config.schedule.per_epoch=False",
    "--config.train.log_every_steps=1", "--config.checkpoint.every_steps=2",
    "--config.checkpoint.keep=20",
]  # fmt: skip


def _error(finished, status):
    lines = finished.stderr.splitlines()
    assert (finished.returncode, len(lines)) == (status, 1), finished.stderr
    return lines[0]


def test_a_full_disk_and_a_read_only_one(small_disk, run_main):
    """One line, and the last good state stays: with more room the same command goes on from it."""
    flags = [*SHORT, f"--workdir={small_disk / 'run'}"]
    line = _error(run_main(*flags), status=1)
    good = kill_and_resume.newest_step(small_disk / "run")
    failed = small_disk / "run" / "checkpoints" / str(good + 2)
    assert good >= 2
    assert line == (
        f"error: {failed} cannot be saved (No space left on device); the last good state is that "
        f"of step {good}; mend that and run the same command to go on"
    )
    assert recovery.find_damage(small_disk / "run" / "checkpoints" / str(good)) is None

    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    line = _error(run_main(*flags), status=2)
    assert line == f"error: --workdir={small_disk / 'run'} cannot be written (it is read-only)"

    subprocess.run(["mount", "-o", "remount,rw,size=200m", str(small_disk)], check=True)
    finished = run_main(*flags)
    assert finished.returncode == 0, finished.stderr
    assert f"resumed at step {good}" in finished.stdout
    lines = (small_disk / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(x)["step"] for x in lines if json.loads(x)["split"] == "train"]
    assert steps == list(range(1, 23))


def test_a_process_that_cannot_save_ends_every_one(tmp_path):
    """At once: none trains on, or waits for the share that one could not write; both go on later.

    A limit on the size of its files stands for a full disk of that host alone.
    """
    workdir, every, good = tmp_path / "run", 10, 0
    flags = [*SHORT, f"--workdir={workdir}", "--config.schedule.epochs=3"]
    flags += [f"--config.checkpoint.every_steps={every}"]
    for failing in (0, 1):
        with several.started(flags, processes=2, script=small_main.SCRIPT) as both:
            good += every
            while kill_and_resume.newest_step(workdir) != good:
                assert all(process.running for process in both)
                time.sleep(0.05)
            assert (f"resumed at step {good - every}" in both[0].stdout) == (good > every)
            limits = (50_000, resource.RLIM_INFINITY)
            resource.prlimit(both[failing].pid, resource.RLIMIT_FSIZE, limits)
            assert [process.wait(60) for process in both] == [1, 1]
        assert kill_and_resume.newest_step(workdir) == good
        assert f"step {good + 2 * every}/" not in both[0].stdout
        reason = f"cannot be saved (File too large); the last good state is that of step {good};"
        for number, process in enumerate(both):
            (line,) = [line for line in process.stderr.splitlines() if "error: " in line]
            assert line.startswith(f"process {number} of 2: error: ")
            assert (f"error: process {failing} of 2 failed: " in line) == (number != failing)
            assert reason in line


def test_a_model_folder_on_a_full_disk_leaves_the_old_one(tmp_path, monkeypatch):
    """A disk that fills up in between, as the system reports it."""
    from tests.checkpoints.test_checkpoint import _tiny

    model_folder.save_model(tmp_path / "model", _tiny(seed=1))

    def full(*_, **__):
        raise OSError(28, "No space left on device", str(tmp_path))

    with monkeypatch.context() as patch:
        patch.setattr(model_folder.json, "dumps", full)
        with pytest.raises(InputError) as caught:
            model_folder.save_model(tmp_path / "model", _tiny(seed=2))
    assert str(caught.value) == f"{tmp_path / 'model'} cannot be written (No space left on device)"
    _assert_equal(model_folder.load_model(tmp_path / "model"), _tiny(seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_renames_no_folders(tmp_path, monkeypatch):
    """As a bucket may not: found before the first step."""

    def refuse(path, _):
        raise OSError(errno.EMFILE, "as the system says", str(path))

    monkeypatch.setattr(checks.Path, "rename", refuse)
    with pytest.raises(InputError, match=r"^--workdir=.* cannot be written \(\[Errno 24\]"):
        loop.train(digits.get_config(), str(tmp_path))


# The terminal


@pytest.mark.parametrize(
    "output", [">/dev/full 2>/dev/full", ">&- 2>&-", "2>/dev/full", "> >(true) 2> >(true)"]
)
def test_nobody_reads_what_it_prints(output):
    """Nor is there room: the run goes on, and ends as one that is read, with all its last lines."""
    script = (
        "import time; from deit_jax.console import complain, say; time.sleep(0.5)\n"
        "for number in range(1000): say(f'line {number}'); complain('two')"
    )
    command = f'exec "$0" -c "$1" {output}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, script],
        cwd=several.ROOT,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        timeout=60,
    )
    assert done.returncode == 0


# SIGTERM

STANDING_STILL = """
import sys, time
from deit_jax import stopping
with stopping.StopSignal() as stop:
    if sys.argv[1] != "set-up":
        stop.asked(1)
    print("ready", flush=True)
    time.sleep(60 if sys.argv[1] != "slow step" else 3)
    if stop.asked(2):
        print("saved", flush=True)
"""


@pytest.mark.parametrize(
    ("phase", "signals", "status", "words"),
    [
        ("set-up", 1, 0, "stopped before the first step; run the same command to start again"),
        ("training", 2, 143, "stopped at once by a second SIGTERM"),
        ("slow step", 2, 0, "saved"),  # signalled twice at once
    ],
)
def test_signals_that_the_loop_cannot_answer(phase, signals, status, words):
    """In set-up the first one ends the process, cleanly; in a step that hangs, the second one.

    Two at once, as `timeout` sends them, are one, which the loop does answer after its step.
    """
    with subprocess.Popen(
        [sys.executable, "-c", STANDING_STILL, phase],
        cwd=several.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        for number in range(signals):
            assert process.poll() is None, "ended by the first signal"
            process.send_signal(signal.SIGTERM)
            if number + 1 < signals:
                time.sleep(0.1 if phase == "slow step" else 3)
        try:
            assert process.wait(10) == status
        finally:
            process.kill()
        assert words in process.stdout.read()


# What starts the tests may ignore Ctrl-C, as a shell does for its background jobs.
WITH_CTRL_C = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv[0] = "main.py"
runpy.run_path("main.py", run_name="__main__")
"""


def test_ctrl_c_is_one_line(tmp_path):
    """Not a traceback, and what was saved stays."""
    workdir = tmp_path / "run"
    flags = [*SHORT, "--config.schedule.epochs=100", f"--workdir={workdir}"]
    with subprocess.Popen(
        [sys.executable, "-c", WITH_CTRL_C, *flags],
        cwd=several.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            while not process.stdout.readline().startswith("step 5/"):
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    line = "error: interrupted; the last checkpoint stays, run the same command to go on\n"
    assert (process.returncode, stderr) == (130, line)
    step = kill_and_resume.newest_step(workdir)
    assert step >= 2
    assert recovery.find_damage(workdir / "checkpoints" / str(step)) is None
