"""Kills and stops a run of two processes at random, restarts it, and compares it with one in peace.

python -m tests.chaos --rounds=50 --seed=0 --workdir=DIR

Each round sends SIGKILL or SIGTERM to one process or to both, in set-up, in a step, in a save
(after every third step) or in an evaluation (after every fifth), and reads the checkpoint that is
the newest then. A process whose fellow is killed should end by itself; after a grace this script
kills it, as a scheduler would.
Prints what every round did and what the next start recovered, and every array and figure that
differs by a bit; exits non-zero if one does, or if a checkpoint was unreadable.
"""

import argparse
import dataclasses
import json
import random
import re
import signal
import sys
import time
from pathlib import Path

from tests import kill_and_resume, several

PROCESSES = 2
STEPS_PER_EPOCH = 5  # of a sixteenth of the digits, 16 at a time; each epoch is evaluated
STEPS_PER_SAVE = 3
STEPS_A_ROUND = 5
MOMENTS = {  # how often one of five blows falls there, after which steps, and seconds after that
    "set-up": (1, None, 20),
    "a step": (2, 1, 1),
    "a save": (1, STEPS_PER_SAVE, 0.1),
    "an evaluation": (1, STEPS_PER_EPOCH, 0.3),
}
GRACE_SECONDS = 5
STOP_SECONDS = 120  # for a stop by SIGTERM, with everything it may wait for


@dataclasses.dataclass(frozen=True)
class Blow:
    """What a round does, and when."""

    signal: signal.Signals
    targets: tuple[int, ...]  # processes
    moment: str
    steps: int  # new ones to wait for before, but in set-up
    delay: float  # seconds from then on, or from the start of the processes


def draw(rng: random.Random) -> Blow:
    """A random blow."""
    moment = rng.choices(list(MOMENTS), [weight for weight, _, _ in MOMENTS.values()])[0]
    return Blow(
        signal=rng.choice([signal.SIGKILL, signal.SIGTERM]),
        targets=rng.choice([(0,), (1,), (0, 1)]),
        moment=moment,
        steps=rng.randint(1, STEPS_A_ROUND),
        delay=rng.uniform(0, MOMENTS[moment][2]),
    )


def flags(rounds: int) -> list[str]:
    """The recipe: long enough for so many rounds, with everything random in it."""
    epochs = -(-(rounds + 1) * 2 * STEPS_A_ROUND // STEPS_PER_EPOCH)
    return [
        "--config=configs/digits.py",
        "--config.dataset.train_fraction=0.0625",
        "--config.train.batch_size=16",
        f"--config.schedule.epochs={epochs}",
        "--config.schedule.warmup_epochs=0",
        "--config.mixing.random_erasing=0.25",
        "--config.model.drop_path_rate=0.1",
        "--config.train.log_every_steps=1",
        "--config.train.eval_every_epochs=1",
        "--config.checkpoint.every_epochs=0",
        f"--config.checkpoint.every_steps={STEPS_PER_SAVE}",
        # Less than a round waits: SIGTERM may end a process before it connects.
        "--config.distributed.start_timeout=90",
    ]


class Chaos:
    """A run that is disturbed, and what was wrong with it."""

    def __init__(self, workdir: Path, rounds: int, script: Path | str):
        self.workdir, self.problems = workdir, []
        self._flags = flags(rounds)
        self._options = {"processes": PROCESSES, "script": script}
        self._resumed = 0  # of the last start that came so far as to say it

    def round(self, number: int, blow: Blow) -> bool:
        """Starts the processes, strikes, and looks at what is left; False if the run is done."""
        before = kill_and_resume.newest_step(self.workdir)
        with several.started(
            [*self._flags, f"--workdir={self.workdir}"], **self._options
        ) as processes:
            struck = self._wait(processes, blow)
            for target in blow.targets:
                processes[target].send(blow.signal)
            how = self._let_end(processes, blow, struck)
            log = processes[0].stdout
            self._check_stop(number, processes)
        recovered = re.search(r"resumed at step (\d+)|from scratch", log)
        if recovered:
            self._resumed = int(recovered[1] or 0)
            self._expect(
                self._resumed == before, f"round {number}: resumed at {recovered[0]}, not {before}"
            )
        newest = self._read_newest(number)
        steps = _steps(log)
        print(
            f"round {number}: {recovered[0] if recovered else 'in set-up'}, "
            f"{blow.signal.name} to {' and '.join(map(str, blow.targets))} in {blow.moment} after "
            f"{f'step {steps[-1]}' if steps else 'no step'}, {how}; newest checkpoint: {newest}",
            flush=True,
        )
        return struck

    def to_the_end(self, workdir: Path) -> list[several.Process]:
        """The processes of a run in peace, when they have ended."""
        return several.run([*self._flags, f"--workdir={workdir}"], seconds=1200, **self._options)

    def finish(self) -> None:
        """Lets the run come to its end."""
        processes = self.to_the_end(self.workdir)
        for process in processes:
            self._expect(process.returncode == 0, f"the last start failed:\n{process.stderr}")
        log = processes[0].stdout
        recovered = re.search(r"resumed at step \d+|from scratch", log)
        print(f"last start: {recovered[0] if recovered else ''} to the end", flush=True)

    def _expect(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems.append(problem)
            print(problem, flush=True)

    def _check_stop(self, number: int, processes: list[several.Process]) -> None:
        """All processes stop after the same step, and it is the newest checkpoint."""
        said = [re.findall(r"stopped and saved at step (\d+);", p.stdout) for p in processes]
        if any(said):
            newest = [str(kill_and_resume.newest_step(self.workdir))]
            self._expect(
                said == [newest] * PROCESSES,
                f"round {number}: stopped at steps {said}, but the newest checkpoint is {newest}",
            )

    def _wait(self, processes: list[several.Process], blow: Blow) -> bool:
        """Until the moment of the blow; False if the run comes to its end before."""
        begin = time.monotonic()
        if (every := MOMENTS[blow.moment][1]) is not None:
            while True:
                steps = _steps(processes[0].stdout)
                if len(steps) >= blow.steps and steps[-1] % every == 0:
                    break
                if "Final report" in processes[0].stdout or not processes[0].running:
                    return False
                time.sleep(0.005)
            begin = time.monotonic()
        while time.monotonic() < begin + blow.delay:
            if "Final report" in processes[0].stdout:
                return False
            time.sleep(0.02)
        return True

    def _let_end(self, processes: list[several.Process], blow: Blow, struck: bool) -> str:
        killed = blow.signal == signal.SIGKILL
        begin = time.monotonic()
        deadline = begin + (GRACE_SECONDS if killed else STOP_SECONDS)
        while any(process.running for process in processes) and time.monotonic() < deadline:
            time.sleep(0.05)
        seconds = f"{time.monotonic() - begin:.1f} s"
        left = [process for process in processes if process.running]
        for process in left:
            process.kill()
        codes = [process.returncode for process in processes]
        if not killed:
            # A process that does not listen yet dies of the signal, and the other one of its loss.
            allowed = (
                {75}
                if struck and blow.moment != "set-up" and "Final report" not in processes[0].stdout
                else {0, 75, 1, -signal.SIGTERM, -signal.SIGABRT}
            )
            self._expect(
                not left and allowed.issuperset(codes),
                f"SIGTERM ended in {codes}:\n" + "\n".join(p.stderr[-2000:] for p in processes),
            )
            return f"both ended after {seconds} with {codes}"
        if len(blow.targets) == PROCESSES:
            return "both dead"
        if left:
            return f"the other one was killed after a grace of {GRACE_SECONDS} s"
        return f"the other one ended by itself after {seconds} with {codes[1 - blow.targets[0]]}"

    def _read_newest(self, number: int) -> str:
        """Reads every array and file of the newest checkpoint."""
        step = kill_and_resume.newest_step(self.workdir)
        if not step:
            return "none yet"
        folder = self.workdir / "checkpoints" / str(step)
        try:
            arrays = kill_and_resume.final_arrays(self.workdir)
            json.loads((folder / "meta" / "metadata").read_text())
        except Exception as error:  # whatever the libraries raise
            self._expect(False, f"round {number}: checkpoint {step} is unreadable: {error!r}")
            return f"{step}, unreadable"
        self._expect(int(arrays["step"]) == step, f"round {number}: {step} holds another step")
        return f"{step}, readable"


def _steps(log: str) -> list[int]:
    return [int(step) for step in re.findall(r"^step (\d+)/", log, re.MULTILINE)]


def run(
    rounds: int, seed: int, workdir: Path, script: Path | str = "main.py"
) -> tuple[list[str], int]:
    """One run in peace, and one with so many rounds of chaos, of `script` with main.py's flags.

    Returns:
      What was wrong at the end or on the way, and the number of rounds before the run was done.
    """
    peace, rng = workdir / "undisturbed", random.Random(seed)
    chaos = Chaos(workdir / "disturbed", rounds, script)
    for process in chaos.to_the_end(peace):
        if process.returncode != 0:
            raise RuntimeError(f"the undisturbed run failed:\n{process.stdout}\n{process.stderr}")
    done = 0
    while done < rounds and chaos.round(done + 1, draw(rng)):
        done += 1
    chaos.finish()
    return chaos.problems + kill_and_resume.compare(peace, chaos.workdir), done


def main() -> None:
    """Parses the flags and reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, required=True)
    arguments = parser.parse_args()
    problems, done = run(arguments.rounds, arguments.seed, arguments.workdir.absolute())
    if done < arguments.rounds:
        problems.append(f"the run was done before round {done + 1} of {arguments.rounds}")
    if problems:
        sys.exit("\n".join(problems))
    print(f"bit-identical after {done} rounds; every checkpoint was readable after each of them")


if __name__ == "__main__":
    main()
