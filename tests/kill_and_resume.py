"""Kills a training run at random steps, restarts it, and compares it with one left in peace.

python tests/kill_and_resume.py --kills=3 --seed=0 --workdir=DIR [main.py flags ...]

Both runs share DIR/teacher. Exits non-zero at the first array or figure that differs by a bit.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).resolve().parent.parent


def launch(workdir: Path, flags: list[str], kill_at: int | None = None) -> int:
    """Runs main.py, killing it once it reports step `kill_at`; returns its last step."""
    command = [sys.executable, "main.py", f"--workdir={workdir}", *flags]
    command.append("--config.train.log_every_steps=1")
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        step, output, student = 0, [], False
        for line in process.stdout:
            output.append(line)
            # The teacher's steps, where it is trained first, are none of the student's.
            student = student or line.strip() == f"Run {workdir}"
            found = re.match(r"step (\d+)/", line)
            if student and found:
                step = int(found[1])
                if kill_at is not None and step >= kill_at:
                    process.kill()
                    process.wait()
                    return step
        stderr = process.stderr.read()
    if process.returncode != 0:
        raise RuntimeError(f"main.py exited {process.returncode}:\n{''.join(output)}\n{stderr}")
    return step


def final_arrays(workdir: Path) -> dict[str, np.ndarray]:
    """Every array of the run's last checkpoint: weights, EMA, optimiser state and counters."""
    steps = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    folder = workdir / "checkpoints" / str(max(steps)) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(folder.absolute())
    leaves = ocp.tree.to_flat_dict(tree, sep="/")
    return {name: np.asarray(leaf) for name, leaf in leaves.items()}


def final_report(workdir: Path) -> dict:
    """The last `final` line of metrics.jsonl."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "final"][-1]


def compare(left: Path, right: Path) -> list[str]:
    """What differs between the ends of two runs, down to the last bit."""
    ours, theirs = final_arrays(left), final_arrays(right)
    problems = [f"only in one run: {name}" for name in ours.keys() ^ theirs.keys()]
    for name in ours.keys() & theirs.keys():
        if ours[name].tobytes() != theirs[name].tobytes():
            problems.append(f"{name}: {np.sum(ours[name] != theirs[name])} elements differ")
    if final_report(left) != final_report(right):
        problems.append(f"final report: {final_report(left)} and {final_report(right)}")
    return problems


def run(kills: int, seed: int, workdir: Path, flags: list[str]) -> list[str]:
    """One undisturbed run, one with `kills` kills; returns what differs and prints each step."""
    flags = [*flags, f"--config.distill.teacher={workdir / 'teacher'}"]
    peace, chaos = workdir / "undisturbed", workdir / "killed"
    total = launch(peace, flags)
    draw = random.Random(seed)
    for at in sorted(draw.sample(range(1, total), kills)):
        print(f"killed at step {launch(chaos, flags, kill_at=at)} of {total}", flush=True)
    launch(chaos, flags)
    return compare(peace, chaos)


def main() -> None:
    """Parses the flags and reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, required=True)
    arguments, flags = parser.parse_known_args()
    flags = flags or ["--config=configs/digits_distill.py"]
    problems = run(arguments.kills, arguments.seed, arguments.workdir.absolute(), flags)
    if problems:
        sys.exit("\n".join(problems))
    print(f"bit-identical after {arguments.kills} kills")


if __name__ == "__main__":
    main()
