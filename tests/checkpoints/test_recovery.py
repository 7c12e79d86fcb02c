"""Full disks, read-only folders, damaged checkpoints, SIGTERM at a bad time: nothing is lost."""

import errno
import functools
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import digits
from deit_jax.checkpoints import model_folder, recovery, training
from deit_jax.errors import InputError, TransientError
from deit_jax.training import loop
from tests import kill_and_resume, several, small_main
from tests.checkpoints.saved import abstract, assert_equal, opened, random_state, save, tiny
from tests.refusal import refusal


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A workdir with checkpoints 1, 2 and 3; its info and its states."""
    workdir = tmp_path_factory.mktemp("three")
    states = {step: random_state(seed=step)[1] for step in (1, 2, 3)}
    info = random_state()[0]
    with opened(workdir, keep=3) as checkpoints:
        for step, state in states.items():
            save(checkpoints, info, state, step)
    return workdir, info, states


@pytest.fixture
def workdir(three, tmp_path):
    """A copy of it, to be spoilt."""
    shutil.copytree(three[0], tmp_path / "run")
    return tmp_path / "run"


SPOIL = {
    "delete": lambda file: file.unlink(),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "garbage": lambda file: file.write_bytes(np.random.default_rng(0).bytes(file.stat().st_size)),
}


def restored(workdir, **options):
    """The step to resume at, and its state."""
    with opened(workdir, keep=3, **options) as checkpoints:
        state, best, step = checkpoints.restore(abstract(random_state()[1]))
        assert best["step"] == step
        return step, state


@pytest.mark.parametrize("meta", ["{}", "null", "[" * 100_000, '{"model": 3, "ema": false}', ""])
def test_a_description_that_is_none_costs_one_checkpoint(three, workdir, meta):
    (workdir / "checkpoints" / "3" / "meta" / "metadata").write_text(meta)
    (workdir / "checkpoints" / "²").mkdir()  # a digit of which int makes nothing
    with opened(workdir, keep=3) as checkpoints:
        checkpoints.check(three[1], ema=random_state()[1].ema is not None)
    assert restored(workdir)[0] == 2


@pytest.mark.slow
def test_any_file_damaged_costs_one_checkpoint_at_most(three, tmp_path, capsys):
    """Each file of the newest one: it is read all the same, or the one before, bit for bit."""
    source, _, states = three
    newest = source / "checkpoints" / "3"
    files = [path.relative_to(source) for path in newest.rglob("*") if path.is_file()]
    fell_back = set()
    for file, (how, spoil) in itertools.product(files, SPOIL.items()):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(source, copy)
        spoil(copy / file)
        step, state = restored(copy)
        assert_equal(state, states[step])
        captured = capsys.readouterr()
        assert captured.err == ""
        if step == 3:
            assert captured.out == ""
            continue
        assert step == 2
        (line,) = captured.out.splitlines()
        assert line.startswith(f"warning: {copy / 'checkpoints' / '3'} cannot be read (")
        assert line.endswith("; using step 2 instead; it stays as 3.unreadable")
        assert (copy / "checkpoints" / "3.unreadable").is_dir()
        # The arrays are in folders d, under names of their own.
        fell_back.add(("d" if file.parent.name == "d" else f"{file.parent.name}/{file.name}", how))
    needed = ("state/_METADATA", "meta/metadata", "state/manifest.ocdbt", "d")
    assert fell_back >= set(itertools.product(needed, SPOIL))


def test_what_was_set_aside_is_kept_and_its_step_saved_anew(three, workdir):
    _, info, states = three
    for again in ("", ".2"):
        SPOIL["cut"](workdir / "checkpoints" / "3" / "state" / "manifest.ocdbt")
        assert restored(workdir)[0] == 2
        with opened(workdir, keep=3) as checkpoints:
            save(checkpoints, info, states[2], 3)
        assert (workdir / "checkpoints" / f"3.unreadable{again}" / "state").is_dir()
        step, state = restored(workdir)
        assert step == 3
        assert_equal(state, states[2])


def test_evaluation_changes_nothing(three, workdir, capsys):
    """A run may go on meanwhile: what cannot be read is passed over, and stays where it is."""
    SPOIL["delete"](workdir / "checkpoints" / "3" / "meta" / "metadata")
    step, state = restored(workdir, set_aside=False)
    assert step == 2
    assert_equal(state, three[2][2])
    assert capsys.readouterr().out.endswith("using step 2 instead\n")
    assert (workdir / "checkpoints" / "3").is_dir()


def test_no_checkpoint_that_can_be_read_is_an_error(workdir):
    """Never from scratch in silence: nothing is renamed either."""
    for step in ("1", "2", "3"):
        SPOIL["cut"](workdir / "checkpoints" / step / "state" / "_METADATA")
    newest = str(workdir / "checkpoints" / "3")
    assert refusal(restored, workdir).startswith(f"{newest} cannot be read (")
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["1", "2", "3"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize(
    ("function", "where"),
    [
        ("pathlib.Path.iterdir", "checkpoints cannot be read now"),
        (f"{training.__name__}._read_meta", "3 cannot be read now"),
    ],
)
def test_a_disk_that_fails_is_no_damage(workdir, monkeypatch, capsys, number, function, where):
    """Nothing is set aside: whoever started the run starts it again."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(function, refuse)
        with pytest.raises(TransientError, match=f"{where} .{os.strerror(number)}"):
            restored(workdir)
    assert restored(workdir)[0] == 3
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", [None, InputError, TransientError])
def test_what_another_process_meets_counts_for_this_one(workdir, monkeypatch, kind):
    """It must not go on from what the other cannot read, nor wait for it."""

    def gather(what, mine, **_):
        name = kind.__name__ if kind else "Damage"
        return [mine, f"{name} its words" if what == f"the reading of {newest}" else mine]

    newest = workdir / "checkpoints" / "3"
    monkeypatch.setattr(recovery.hosts, "gather", gather)
    if kind is None:
        assert restored(workdir)[0] == 2
    else:
        assert refusal(restored, workdir, kind=kind) == "its words"
        assert newest.exists()


def test_a_mistake_of_ours_is_not_taken_for_damage(workdir, monkeypatch):
    monkeypatch.setattr(training, "_check_names", lambda *_: jax.no_such_name)
    with pytest.raises(AttributeError):
        restored(workdir)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["1", "2", "3"]


# The disk


@pytest.fixture
def small_disk(tmp_path):
    """A disk with room for a few checkpoints of the digits; only root may mount one."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", str(mount)]
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


@pytest.mark.slow
def test_a_full_disk_and_a_read_only_one(small_disk, run_python):
    """One line, and the last good state stays: with more room the same command goes on from it."""
    flags = [small_main.SCRIPT, *SHORT, f"--workdir={small_disk / 'run'}"]
    line = _error(run_python(*flags), status=1)
    good = kill_and_resume.newest_step(small_disk / "run")
    failed = small_disk / "run" / "checkpoints" / str(good + 2)
    assert good >= 2
    assert line == (
        f"error: {failed} cannot be saved (No space left on device); the last good state is that "
        f"of step {good}; mend that and run the same command to go on"
    )
    assert kill_and_resume.final_arrays(small_disk / "run")

    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    line = _error(run_python(*flags), status=2)
    assert line.startswith(f"error: --workdir={small_disk / 'run'} cannot be written (")
    assert "run is read-only)" in line

    subprocess.run(["mount", "-o", "remount,rw,size=200m", str(small_disk)], check=True)
    finished = run_python(*flags)
    assert finished.returncode == 0, finished.stderr
    assert f"resumed at step {good}" in finished.stdout
    lines = (small_disk / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(x)["step"] for x in lines if json.loads(x)["split"] == "train"]
    assert steps == list(range(1, 23))


@pytest.mark.slow
def test_a_process_that_cannot_save_ends_every_one(tmp_path):
    """At once: none trains on, or waits for the share that one could not write; both go on later.

    A limit on the size of its files stands for a full disk of that host alone. In between, the
    newest checkpoint is damaged.
    """
    workdir, every, good = tmp_path / "run", 10, 20
    flags = [*SHORT, f"--workdir={workdir}", "--config.schedule.epochs=3"]
    flags += [f"--config.checkpoint.every_steps={every}"]
    for failing, start in ((0, "from scratch"), (1, f"resumed at step {good - every}")):
        with several.started(flags, processes=2, script=small_main.SCRIPT) as both:
            both[0].wait_for(start)
            while kill_and_resume.newest_step(workdir) != good:
                assert all(process.running for process in both)
                time.sleep(0.05)
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
        SPOIL["cut"](workdir / "checkpoints" / str(good) / "state" / "manifest.ocdbt")
    assert "using step 10 instead; it stays as 20.unreadable" in both[0].stdout
    assert "warning: " not in both[1].stdout


def test_a_folder_that_cannot_be_made_leaves_nobody_waiting(tmp_path):
    """Orbax's threads would wait for it, and Python's end for them."""
    info, state = random_state()
    before = threading.enumerate()
    with opened(tmp_path / "run", keep=3) as checkpoints:
        save(checkpoints, info, state, 1)
        checkpoints._manager.wait_until_finished()
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "run").write_text("")
        line = refusal(save, checkpoints, info, state, 2, kind=TransientError)
    assert "/2 cannot be saved (Not a directory)" in line
    left = [t for t in threading.enumerate() if t not in before and not t.daemon]
    assert [thread for thread in left if not _ends(thread)] == []


def _ends(thread):
    thread.join(5)
    return not thread.is_alive()


def test_a_model_folder_on_a_full_disk_leaves_the_old_one(tmp_path, monkeypatch):
    """A disk that fills up in between, as the system reports it."""
    model_folder.save_model(tmp_path / "model", tiny(seed=1))

    def full(*_, **__):
        raise OSError(28, "No space left on device", str(tmp_path))

    with monkeypatch.context() as patch:
        patch.setattr(model_folder.storage, "replace_text", full)
        again = functools.partial(model_folder.save_model, replace=True)
        line = refusal(again, tmp_path / "model", tiny(seed=2), kind=TransientError)
    assert line == f"{tmp_path / 'model'} cannot be written (No space left on device)"
    assert_equal(model_folder.load_model(tmp_path / "model"), tiny(seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_renames_no_folders(tmp_path, monkeypatch):
    """As a bucket may not: found before the first step."""

    def refuse(path, _):
        raise OSError(errno.EMFILE, "as the system says", str(path))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(InputError, match=r"^--workdir=.* cannot be written \(as the system says\)"):
        loop.train(digits.get_config(), str(tmp_path))


# What starts the tests may ignore Ctrl-C, as a shell does for its background jobs.
WITH_CTRL_C = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_path("tests/small_main.py", run_name="__main__")
"""


@pytest.mark.slow
def test_ctrl_c_is_one_line(tmp_path):
    """Not a traceback, and what was saved stays."""
    workdir, script = tmp_path / "run", tmp_path / "main.py"
    script.write_text(WITH_CTRL_C)
    flags = [*SHORT, "--config.schedule.epochs=100", f"--workdir={workdir}"]
    with several.started(flags, processes=1, script=script) as (process,):
        process.wait_for("step 5/")
        process.send(signal.SIGINT)
        assert process.wait(60) == 130
        line = "error: interrupted; the last checkpoint stays, run the same command to go on\n"
        assert process.stderr == line
    assert kill_and_resume.newest_step(workdir) >= 2
    assert kill_and_resume.final_arrays(workdir)
