"""SIGTERM stops every process after the same step."""

import itertools
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from deit_jax.parallel import preemption


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
