"""Compares a student without teacher, with hard and with soft distillation, over several seeds.

python tools/distillation_table.py --workdir=runs/table [--seeds 0 1 2] [--train_fraction=1.0]
    [--epochs_factor=1] [main.py flags for the students ...]

Every seed trains its own teacher, on the same images as the students; all students train for the
same number of epochs. Runs that are finished are read, not repeated. Prints a Markdown table row a
method: mean ± standard deviation of top-1 (percent) over the seeds, and each seed's figure.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from deit_jax.config.files import load_config  # noqa: E402

METHODS = {
    "plain student": ["--config=configs/digits.py"],
    "hard distillation": ["--config=configs/digits_distill.py"],
    "soft distillation": [
        "--config=configs/digits_distill.py",
        "--config.distill.kind=soft",  # weight and temperature of the paper, section 4
        "--config.distill.alpha=0.1",
        "--config.distill.temperature=3.0",
        "--config.distill.reduction=batchmean",
    ],
}
TEACHER = ["--config=configs/digits_teacher.py"]


def train(workdir: Path, flags: list[str]) -> float:
    """The final top-1 of main.py run with `flags`; a run that is finished with them is read."""
    marker = workdir / "flags.json"
    if not (marker.is_file() and json.loads(marker.read_text()) == flags):
        if workdir.exists():
            sys.exit(f"error: {workdir} holds a run with other flags; choose another --workdir")
        workdir.mkdir(parents=True)
        marker.write_text(json.dumps(flags), encoding="utf-8")
    report = _final(workdir)
    if report is None:
        print(f"training {workdir}", file=sys.stderr, flush=True)
        command = [sys.executable, "main.py", f"--workdir={workdir}", *flags]
        with (workdir / "log.txt").open("w", encoding="utf-8") as log:
            done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        report = _final(workdir)
        if done.returncode or report is None:
            last = (workdir / "log.txt").read_text(encoding="utf-8").splitlines()[-1:]
            sys.exit(f"error: {workdir} did not finish: {' '.join(last)}")
    return report["top1"]


def _final(workdir: Path) -> dict[str, float] | None:
    """The final report of a run that has written its model, which it does last but for that."""
    file = workdir / "metrics.jsonl"
    if not file.is_file() or not (workdir / "model" / "model.json").is_file():
        return None
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return next((line for line in reversed(lines) if line["split"] == "final"), None)


def _scaled(flags: list[str], factor: int) -> list[str]:
    """The flag that multiplies a recipe's own number of epochs."""
    epochs = load_config(str(ROOT / flags[0].removeprefix("--config="))).schedule.epochs
    return [f"--config.schedule.epochs={epochs * factor}"]


def main() -> None:
    """Trains what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train_fraction", type=float, default=1.0)
    parser.add_argument("--epochs_factor", type=int, default=1, help="times the recipes' epochs")
    arguments, student_flags = parser.parse_known_args()
    workdir = arguments.workdir.absolute()

    figures: dict[str, list[float]] = {"teacher": []} | {name: [] for name in METHODS}
    for seed in arguments.seeds:
        common = [
            f"--config.train.seed={seed}",
            f"--config.dataset.train_fraction={arguments.train_fraction}",
        ]
        teacher = workdir / f"seed{seed}" / "teacher"
        flags = TEACHER + common + _scaled(TEACHER, arguments.epochs_factor)
        figures["teacher"].append(train(teacher, flags))
        for name, recipe in METHODS.items():
            flags = recipe + common + _scaled(recipe, arguments.epochs_factor) + student_flags
            if recipe != METHODS["plain student"]:
                flags.append(f"--config.distill.teacher={teacher}")
            run = workdir / f"seed{seed}" / name.replace(" ", "_")
            figures[name].append(train(run, flags))

    print(f"| | top-1, mean ± sd of {len(arguments.seeds)} seeds | each seed |\n|---|---|---|")
    for name, values in figures.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        each = ", ".join(f"{value:.2f}" for value in values)
        print(f"| {name} | {statistics.mean(values):.2f} ± {spread:.2f} | {each} |")


if __name__ == "__main__":
    main()
