"""SIGTERM stops every process after the same step or batch; at once what has nothing to save."""

import itertools
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from flax import nnx

import deit_jax
from deit_jax.errors import Preempted
from deit_jax.models import registry
from deit_jax.parallel import preemption
from tests import kill_and_resume, several, small_main


def test_the_signal_is_answered_once_a_step_and_given_back(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with preemption.StopSignal() as stop:
        assert not stop.asked()
        for _ in range(2):  # as `timeout` sends it: to the process, and to its group
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked()
    assert signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().out.count("SIGTERM") == 1
    with preemption.StopSignal() as stop:
        assert not stop.asked()


@pytest.mark.parametrize("saves_first", [False, True])
def test_who_listened_before_hears_it_while_there_is_nothing_to_save(saves_first):
    """The command line, which ends at once."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *arguments: heard.append(arguments[0]))
    try:
        with preemption.StopSignal() as stop:
            stop.check_alone()
            stop.saves_first = saves_first
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard == ([] if saves_first else [signal.SIGTERM])
            for check in (stop.check, stop.check_alone):  # for a caller that goes on
                with pytest.raises(Preempted):
                    check()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_leave_signals_alone():
    def listen():
        with preemption.StopSignal():
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(listen).result() == signal.getsignal(signal.SIGTERM)


class Store(dict):
    """The coordinator's keys and values."""

    def key_value_set(self, key, value):
        assert key not in self
        self[key] = value

    def key_value_dir_get(self, folder):
        return [entry for entry in self.items() if entry[0].startswith(folder)]


@pytest.mark.parametrize("told", [(0,), (1,), (0, 1)])
def test_all_processes_stop_after_the_same_step(monkeypatch, told):
    """Whichever is ahead, which is by one step at most, and whenever each of them is told."""
    for lead, *when in itertools.product((-1, 0, 1), range(4), range(4)):
        store, stopped = Store(), {}
        monkeypatch.setattr(preemption.couplings, "store", lambda store=store: store)
        monkeypatch.setattr(preemption.hosts, "several", lambda: True)
        processes = [preemption.StopSignal() for _ in range(2)]
        for process in processes:
            process._key = "stop/"
        turns = [(step, 0) for step in range(9)] + [(step + 0.5 + lead, 1) for step in range(9)]
        for turn, number in sorted(turns):
            step = int(turn if number == 0 else turn - 0.5 - lead)
            monkeypatch.setattr(preemption.hosts, "index", lambda number=number: number)
            if number in told and step == when[number]:
                processes[number]._told = True
            if number not in stopped and processes[number].asked():
                stopped[number] = step
        assert len(set(stopped.values())) == 1, (lead, when, stopped)
        assert len(stopped) == 2


SHORT = ["--config=configs/digits.py", "--config.train.batch_size=16"]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "processes"), [("train", 2), ("eval", 1)])
def test_sigterm_with_nothing_to_save_ends_at_once(tmp_path, mode, processes):
    """In set-up, and in an evaluation alone: every process with 75."""
    flags = [*SHORT, f"--workdir={tmp_path / 'run'}", f"--mode={mode}"]
    if mode == "eval":
        (tmp_path / "run").mkdir()
        options = {"num_classes": 10, "image_size": 32, "patch_size": 8}
        model = registry.create_model("deit_testing", **options, rngs=nnx.Rngs(0))
        deit_jax.save_model(tmp_path / "model", model)
        flags += [f"--config.init_from={tmp_path / 'model'}"]
    script = small_main.SCRIPT if mode == "train" else "main.py"  # quicker, but other models
    with several.started(flags, processes=processes, script=script) as running:
        running[0].wait_for("  devices ")
        running[-1].send(signal.SIGTERM)
        begin = time.monotonic()
        assert [process.wait(60) for process in running] == [75] * processes
        assert time.monotonic() < begin + 10
    said = "process 0 of 2: process 1 of 2 " if processes == 2 else ""
    assert f"deit-jax: {said}stopped with nothing new to save" in running[0].stdout
    assert [process.stderr for process in running] == [""] * processes
    assert kill_and_resume.newest_step(tmp_path / "run") == 0


IN_COMPILED_CODE = """
import hashlib, sys
from deit_jax.cli import main
from deit_jax.training import loop

def train(*_):
    print("compiling", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

loop.train = train
main.main(sys.argv[1:], by_mode=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_compiled_code_does_not_keep_a_signal_waiting(tmp_path, number):
    """Python's own handlers would come when it returns, here after a quarter of an hour."""
    script = tmp_path / "main.py"
    script.write_text(
        f"import signal\nsignal.signal(2, signal.default_int_handler){IN_COMPILED_CODE}"
    )
    flags = [*SHORT, f"--workdir={tmp_path / 'run'}"]
    with several.started(flags, processes=1, script=script) as (process,):
        process.wait_for("compiling")
        process.send(number)
        assert process.wait(20) == {signal.SIGTERM: 75, signal.SIGINT: 130}[number]
