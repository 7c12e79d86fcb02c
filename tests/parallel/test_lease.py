"""One run, one folder: on a disk, on storage of several hosts without locks, and in a bucket."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from deit_jax import storage
from deit_jax.errors import InputError, TransientError
from deit_jax.parallel import holders, lease
from tests import bucket, lease_holder, several, small_main

STATED = lease.RENEW_SECONDS, holders.WATCH_SECONDS
KINDS = [
    pytest.param("disk", id="disk"),  # of one machine
    pytest.param("nfs", marks=pytest.mark.slow),  # of hosts that cannot look at each other's pids
    pytest.param("bucket", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, module in (("RENEW", lease), ("WATCH", holders), ("LOOK", holders)):
        monkeypatch.setattr(module, f"{name}_SECONDS", lease_holder.TIMES[name])


def test_a_holder_may_be_late_several_times():
    renew, watch = STATED
    assert watch > 5 * renew


@pytest.fixture(scope="module")
def root():
    with bucket.in_this_process():
        yield storage.path_of(f"gs://{bucket.NAME}")


@pytest.fixture
def workdir(request, tmp_path):
    if request.getfixturevalue("kind") == "bucket":
        return request.getfixturevalue("root") / tmp_path.name
    return tmp_path / "run"


@contextlib.contextmanager
def _started(workdir, kind, tmp_path, count):
    """So many starts at once; gives the processes, the winner first."""
    go = tmp_path / "go"
    running = []
    try:
        for number in range(count):
            flags = [workdir, "" if kind == "disk" else f"machine {number}", go]
            running.append(several.Process(lease_holder.SCRIPT, flags, {}))
        for process in running:
            process.wait_for("ready")
        go.write_text("")
        deadline = time.monotonic() + 30
        while not all("held" in p.stdout or "Error" in p.stdout for p in running):
            assert time.monotonic() < deadline, [p.stdout + p.stderr for p in running]
            time.sleep(0.05)
        yield sorted(running, key=lambda process: "held" not in process.stdout)
    finally:
        for process in running:
            process.kill()


def _wait_for_zombie(pid):
    while holders.state_of(pid)[0] != "Z":
        time.sleep(0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_of_starts_at_once_one_wins_and_a_dead_one_loses_it(kind, workdir, tmp_path):
    with _started(workdir, kind, tmp_path, 3) as (winner, *others):
        for process in others:
            assert process.wait(30) == 0, process.stderr
            (line,) = re.findall("^TransientError.*", process.stdout, re.MULTILINE)
            assert f"in use by process {winner.pid} on " in line
            assert "UTC; wait until that ends" in line
            assert "held" not in process.stdout
        assert winner.running
        winner.send(signal.SIGKILL)
        _wait_for_zombie(winner.pid)  # which it stays until someone asks for its status
        begin = time.monotonic()
        with lease.held(workdir):
            seconds = time.monotonic() - begin
            (file,) = holders.files(storage.path_of(workdir))
            assert json.loads(holders.read(file))["pid"] == os.getpid()
        assert holders.files(storage.path_of(workdir)) == []
        if kind == "disk":
            assert seconds < 1
        else:
            assert holders.WATCH_SECONDS <= seconds < holders.WATCH_SECONDS + 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_suspended_holder_finds_its_lease_taken(kind, workdir, tmp_path):
    """On one machine it keeps it: it lives, and may write at any time."""
    with _started(workdir, kind, tmp_path, 1) as (holder,):
        holder.send(signal.SIGSTOP)
        if kind == "disk":
            with pytest.raises(TransientError, match=f"in use by process {holder.pid} "):
                lease.held(workdir).__enter__()
            return
        with lease.held(workdir) as hold:
            holder.send(signal.SIGCONT)
            assert holder.wait(30) == 0
            assert f"taken over by process {os.getpid()} on " in holder.stdout
            time.sleep(2 * lease.RENEW_SECONDS)
            hold.check()


@pytest.mark.parametrize("kind", ["disk", pytest.param("bucket", marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", [1, 2])
def test_a_start_that_has_not_seen_the_other_yields(kind, workdir, monkeypatch, number):
    """It looked just before, or its host remembers an empty folder; also under a free name."""
    look = holders.wait_until_dead
    dead = {workdir / f".lease.{number - 1}.json": None}
    monkeypatch.setattr(holders, "wait_until_dead", lambda *_: dead)
    with lease.held(workdir) as hold:
        seen = [{}]
        monkeypatch.setattr(
            holders, "wait_until_dead", lambda *place: seen.pop() if seen else look(*place)
        )
        with pytest.raises(TransientError, match="in use by process"), lease.held(workdir):
            pass
        hold.check()
        assert [path.name for path in holders.files(workdir)] == [f".lease.{number}.json"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_signals_that_end_at_once_give_it_back(tmp_path, number, status):
    with _started(tmp_path / "run", "disk", tmp_path, 1) as (holder,):
        holder.send(number)
        assert holder.wait(30) == status
    assert not lease.is_held(tmp_path / "run")


def _record(**fields):
    return json.dumps({"id": "x", **holders.this_process(), "renewed": 1} | fields).encode()


def test_what_a_machine_knows_of_its_processes(monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    _wait_for_zombie(ended.pid)
    parent = {"pid": os.getppid(), "started": holders.state_of(os.getppid())[1]}
    monkeypatch.setitem(holders.held_here, "mine", None)
    for lives, fields in [
        (True, parent),
        (False, parent | {"started": "1"}),  # the number was given to another process
        (False, {"pid": ended.pid, "started": holders.state_of(ended.pid)[1]}),  # a zombie
        (True, {"id": "mine"}),
        (False, {}),  # of this process, which could not remove it; or of an earlier pid 1
        (None, parent | {"machine": "after a restart, or another container"}),
        (None, {"pid": "1"}),
    ]:
        assert holders._lives(_record(**fields)) is lives, fields
    ended.wait()
    assert holders._lives(_record(pid=ended.pid)) is False
    for content in (b"", b"[" * 99_999, b"null", b"\xff"):
        assert holders._lives(content) is None
    monkeypatch.setattr(holders, "machine", lambda: "")  # not Linux
    assert holders._lives(_record(machine="")) is None


@pytest.mark.parametrize("content", [b"", b"\xff{", _record(pid=[], host="\x1b[31m", machine=7)])
def test_a_lease_that_says_nothing_is_watched_and_lost(tmp_path, capsys, content):
    (tmp_path / ".lease.7.json").write_bytes(content)
    (tmp_path / ".lease.3.json").symlink_to("nowhere")
    with lease.held(tmp_path):
        assert [path.name for path in holders.files(tmp_path)] == [".lease.8.json"]
    (line,) = capsys.readouterr().out.splitlines()
    assert f"waiting {holders.WATCH_SECONDS} s to see" in line
    assert "\x1b" not in line


def test_one_process_may_train_several_times(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), lease.held(tmp_path / "a"):
            raise KeyError
    assert not (tmp_path / "a").exists()  # a refused run leaves nothing behind
    together = [str(tmp_path / name) for name in "abb"]
    with ThreadPoolExecutor(3) as pool, contextlib.ExitStack() as stack:
        started = [pool.submit(stack.enter_context, lease.held(folder)) for folder in together]
        errors = [future.exception() for future in started]
        assert errors[0] is None
        (refused,) = [error for error in errors[1:] if error]
        assert f"b is in use by process {os.getpid()} on" in str(refused)


def test_what_ends_without_unwinding_gives_it_back(tmp_path):
    with lease.held(tmp_path):
        assert lease.is_held(tmp_path)
        lease.release_all()
        assert not lease.is_held(tmp_path)


@pytest.mark.parametrize("how", ["deleted", "moved", "lease deleted"])
def test_a_workdir_that_goes_stays_gone(tmp_path, how):
    folder = tmp_path / "run"
    with lease.held(folder) as hold:
        hold.check()
        if how == "moved":
            folder.rename(tmp_path / "other")
        elif how == "deleted":
            shutil.rmtree(folder)
        else:
            next(folder.glob(".lease.*")).unlink()
        for wait in (0, 3 * lease.RENEW_SECONDS):
            time.sleep(wait)
            for check in (hold.check, hold.check_here):
                with pytest.raises(InputError, match=r"run is gone .*moved or unmounted") as caught:
                    check()
                assert caught.value.exit_status == 2
    assert folder.exists() == (how == "lease deleted")
    assert not holders.files(folder)


def test_a_renewal_never_touches_the_lease_of_another(tmp_path):
    with lease.held(tmp_path) as hold:
        theirs = _record(id="theirs", pid=7)
        (tmp_path / ".lease.1.json").write_bytes(theirs)
        time.sleep(3 * lease.RENEW_SECONDS)
        with pytest.raises(TransientError, match="taken over by process 7 on "):
            hold.check_here()
    assert (tmp_path / ".lease.1.json").read_bytes() == theirs


RUN = [
    "--config=configs/digits.py",
    "--config.dataset.train_fraction=0.125",
    "--config.train.batch_size=16",
    "--config.train.log_every_steps=1",
    "--config.checkpoint.every_steps=1",
    "--config.schedule.epochs=1000",
]


@pytest.mark.slow
def test_training(tmp_path):
    """A second start is refused, one after a kill goes on at once; then the workdir is moved."""
    flags = [*RUN, f"--workdir={tmp_path / 'run'}"]
    options = {"processes": 1, "script": small_main.SCRIPT}
    with several.started(flags, **options) as (first,):
        first.wait_for("\nstep 2/")
        (second,) = several.run(flags, **options)
        assert second.returncode == 1
        (line,) = second.stderr.splitlines()
        assert f"in use by process {first.pid} on " in line
        assert first.running
    with several.started(flags, **options) as (process,):
        process.wait_for("\nstep ")
        assert "waiting" not in process.stdout
        assert "resumed at step" in process.stdout
        (tmp_path / "run").rename(tmp_path / "moved")
        assert process.wait(60) == 2, process.stderr
        (line,) = process.stderr.splitlines()
        assert "run is gone" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.multihost
def test_every_process_of_a_refused_start_says_so(tmp_path):
    with lease.held(tmp_path / "run"):
        ended = several.run(
            [*RUN, f"--workdir={tmp_path / 'run'}"], processes=2, script=small_main.SCRIPT
        )
    for process in ended:
        assert process.returncode == 1, process.stderr
        assert f"in use by process {os.getpid()} on" in process.stderr
