"""Measures how long a run of the digits takes from SIGTERM to its end, at moments of every kind.

python -m experiments.measure_stop --workdir=runs/stop
python -m experiments.measure_stop --workdir=runs/stop --moments=60 --seed=1

Starts a run for each moment: in turns in set-up, in a training step, in a save, in an evaluation,
in the last evaluation, and while the final models are written. Its evaluation has 180 batches, its
epoch 45 steps. Prints a Markdown table of what the runs themselves have noted: the training steps
and evaluation batches after the signal, and the seconds that went into saving and into the end of
the process, when all is saved.
"""

import contextlib
import dataclasses
import itertools
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from deit_jax.cli.arguments import Parser, one_or_more
from deit_jax.cli.status import exit_status
from deit_jax.console import log_error
from deit_jax.planning.markdown import processor, table

_RECIPE = [
    "--config=digits",
    "--config.dataset.train_fraction=0.0625",
    "--config.train.batch_size=2",
    "--config.train.eval_every_epochs=1",
    "--config.train.log_every_steps=10",
    "--config.schedule.warmup_epochs=0",
    "--config.checkpoint.every_epochs=0",
    "--config.checkpoint.every_steps=10",
]
_PHASES = {"set-up": "set-up", "step": "a training step", "batch": "an evaluation"}
# Their phase; the epochs of the run; what to wait for, how often at most; seconds more at most.
_MOMENTS = {
    "set-up": ("set-up", 2, "start", 1, 6.0),
    "a training step": ("step", 2, "step", 40, 0.05),
    "a save": ("step", 2, "save", 3, 0.2),
    "an evaluation": ("batch", 2, "batch", 150, 0.05),
    "the last evaluation": ("batch", 1, "batch", 150, 0.05),
    "the final models": ("models", 1, "models", 1, 0.2),
}


@dataclasses.dataclass(frozen=True)
class Stop:
    """What came of one signal; times in seconds."""

    moment: str  # one of _MOMENTS
    status: int
    seconds: float  # from the signal to the end of the process
    saving: float  # of these
    ending: float  # of these, since all was saved
    steps: int  # training steps that ended after the signal
    batches: int  # evaluation batches, likewise


def noting(events: Path, flags: list[str]) -> int:
    """Runs `deit-jax train`, and notes what it does in a file, a line each; returns the status."""
    from deit_jax.checkpoints.training import TrainCheckpoints
    from deit_jax.cli.main import main
    from deit_jax.parallel.preemption import StopSignal
    from deit_jax.training import loop
    from deit_jax.training.evaluations import Evaluations

    file, kind = events.open("a", buffering=1), ["step"]

    def note(word: str) -> None:
        file.write(f"{time.monotonic()} {word}\n")

    def around(place: object, name: str, before: str, after: str) -> None:
        inner = getattr(place, name)

        def outer(*arguments: object, **options: object) -> object:
            note(before)
            try:
                return inner(*arguments, **options)
            finally:
                note(after)

        setattr(place, name, outer)

    asked, check = StopSignal.asked, StopSignal.check

    def noted_asked(self: StopSignal) -> bool:  # once after each step, and each batch
        note(kind[0])
        return asked(self)

    def noted_check(self: StopSignal) -> None:
        kind[0] = "batch"
        try:
            check(self)
        finally:
            kind[0] = "step"

    StopSignal.asked, StopSignal.check = noted_asked, noted_check
    around(TrainCheckpoints, "save", "save", "saved")
    around(TrainCheckpoints, "close", "close", "closed")
    around(Evaluations, "after", "evaluate", "evaluated")
    around(loop, "_write_final_models", "models", "written")
    note("start")
    return main(["train", *flags])


def stop(workdir: Path, moment: str, rng: random.Random) -> Stop:
    """Starts a run in a new folder, stops it at a random moment of the kind, and measures."""
    _, epochs, wait_for, times, delay = _MOMENTS[moment]
    shutil.rmtree(workdir, ignore_errors=True)
    workdir.mkdir(parents=True)
    events = workdir / "events.txt"
    flags = [*_RECIPE, f"--workdir={workdir / 'run'}", f"--config.schedule.epochs={epochs}"]
    with (workdir / "log.txt").open("w") as log:
        command = [sys.executable, "-m", __spec__.name, "--run", str(events), *flags]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        times = rng.randint(1, times)
        while process.poll() is None and _words(events).count(wait_for) < times:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, delay))
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        status = process.wait(600)
    finally:
        process.kill()
    return measured(moment, list(_noted(events)), begin, time.monotonic(), status)


def _noted(events: Path) -> Iterator[tuple[float, str]]:
    with contextlib.suppress(FileNotFoundError):
        for line in events.read_text().splitlines():
            with contextlib.suppress(ValueError):  # it is being written
                seconds, word = line.split()
                yield float(seconds), word


def _words(events: Path) -> list[str]:
    return [word for _, word in _noted(events)]


def measured(
    aimed: str, noted: list[tuple[float, str]], begin: float, end: float, status: int
) -> Stop:
    """Returns what a run's notes say of a signal.

    Args:
      aimed: the moment that was meant; where the run was elsewhere, the result says so.
      noted: when and what, in order.
      begin: when the signal was sent.
      end: when the process had ended.
      status: of the process.
    """
    phase = _phase([word for at, word in noted if at <= begin])
    after = [word for at, word in noted if at > begin]
    saving = 0.0
    for (at, word), (until, _) in itertools.pairwise([*noted, (end, "end")]):
        if word in ("save", "close") and until > begin:
            saving += until - max(at, begin)
    closed = max((at for at, word in noted if word == "closed"), default=begin)
    ending = end - max(closed, begin)
    moment = aimed if phase == _MOMENTS[aimed][0] else _PHASES.get(phase, "the final models")
    counts = after.count("step"), after.count("batch")
    return Stop(moment, status, end - begin, saving, ending, *counts)


def _phase(before: list[str]) -> str:
    if "models" in before:
        return "models"
    if before.count("evaluate") > before.count("evaluated"):
        return "batch"
    return "step" if "step" in before else "set-up"


def report(stops: list[Stop]) -> Iterator[str]:
    """Yields the lines of the table."""
    columns = (
        "SIGTERM in", "status × signals", "seconds to the end", "saving", "ending Python",
        "training steps", "evaluation batches",
    )  # fmt: skip
    rows = []
    for moment in _MOMENTS:
        if mine := [each for each in stops if each.moment == moment]:
            statuses = [each.status for each in mine]
            counts = [f"{status} × {statuses.count(status)}" for status in sorted(set(statuses))]
            names = {"seconds": 1, "saving": 1, "ending": 1, "steps": 0, "batches": 0}
            figures = (_spread([getattr(x, name) for x in mine], n) for name, n in names.items())
            rows.append((moment, ", ".join(counts), *figures))
    yield from table(*columns, rows=rows)


def _spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f}; {max(values):.{digits}f}"


def main(argv: list[str] | None = None) -> int:
    """Measures and prints; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--run"]:
        return noting(Path(argv[1]), argv[2:])
    return exit_status(lambda: _run(argv))


def _run(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="of the runs; is emptied")
    parser.add_argument("--moments", type=one_or_more, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    rng, stops = random.Random(arguments.seed), []
    for number, moment in zip(range(arguments.moments), itertools.cycle(_MOMENTS), strict=False):
        stops.append(stop(arguments.workdir.absolute() / "stop", moment, rng))
        log_error(f"{number + 1} of {arguments.moments}: {stops[-1]}")
    print(f"On {processor()}; median; maximum:\n")
    print("\n".join(report(stops)))


if __name__ == "__main__":
    sys.exit(main())
