"""Kills a training run at random steps, restarts it, and compares it with one left in peace.

python -m tests.kill_and_resume --kills=3 --seed=0 --workdir=DIR [main.py flags ...]

Each run trains its own teacher, and one more kill falls into that. Prints every array and figure
that differs by a bit and exits non-zero if one does.
"""

import argparse
import functools
import json
import random
import re
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from deit_jax import storage
from deit_jax.checkpoints import recovery
from tests import several

LOG_EVERY = 3


def launch(
    workdir: storage.Path,
    flags: list[str],
    *,
    script: Path | str = "main.py",
    kill_at: int | None = None,
    delay: float = 0.0,
) -> tuple[int, int]:
    """Runs main.py to its end, or kills it with SIGKILL.

    Args:
      workdir: of the student; the teacher is in its teacher/ folder.
      flags: of main.py.
      script: main.py, or another one with its flags.
      kill_at: the report of the student's step after which to kill; a negative number counts the
        teacher's steps.
      delay: seconds from that report to the kill, so that it falls anywhere in a step or a save.

    Returns:
      The step the student resumed at (0: it did not), and the last one it reported.
    """
    flags = [*flags, f"--workdir={workdir}", f"--config.train.log_every_steps={LOG_EVERY}"]
    killed = False
    with several.started(flags, processes=1, script=script) as (process,):
        while process.running and not killed:
            time.sleep(0.02)
            teacher, _, student = process.stdout.partition(f"Run {workdir}\n")
            if kill_at is not None:
                killed = _last_step(teacher if kill_at < 0 else student) >= abs(kill_at)
        if killed:
            time.sleep(delay)
            process.kill()
    output = process.stdout
    if not killed and process.returncode != 0:
        raise RuntimeError(f"main.py exited {process.returncode}:\n{output}\n{process.stderr}")
    student = output.partition(f"Run {workdir}\n")[2]
    resumed = re.search(r"resumed at step (\d+)", student)
    return int(resumed[1]) if resumed else 0, _last_step(student)


def _last_step(output: str) -> int:
    return max(map(int, re.findall(r"^step (\d+)/", output, re.MULTILINE)), default=0)


def newest_step(workdir: storage.Path) -> int:
    """The step of the run's last checkpoint; 0 without one."""
    return max(recovery.steps_in(workdir / "checkpoints"), default=0)


def final_arrays(workdir: storage.Path) -> dict[str, np.ndarray]:
    """Every array of the run's last checkpoint: weights, EMA, optimiser state and counters."""
    return _arrays(storage.path_of(workdir, "checkpoints", str(newest_step(workdir)), "state"))


def model_arrays(folder: storage.Path) -> dict[str, np.ndarray]:
    """Every array of a model folder."""
    return _arrays(folder / json.loads((folder / "model.json").read_text())["folder"])


def _arrays(folder: storage.Path) -> dict[str, np.ndarray]:
    with ocp.PyTreeCheckpointer() as checkpointer:
        # As NumPy arrays: those of a run with more devices or processes fit nowhere else.
        names = checkpointer.metadata(folder).item_metadata.tree
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
        arguments = ocp.args.PyTreeRestore(restore_args=arguments)
        tree = checkpointer.restore(folder, args=arguments)
    leaves = ocp.tree.to_flat_dict(tree, sep="/")
    return {name: np.asarray(leaf) for name, leaf in leaves.items()}


def metrics(workdir: storage.Path) -> list[dict]:
    """The lines of metrics.jsonl, without the time they took."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line.keys() - {"seconds"}} for line in lines]


def final_report(workdir: storage.Path) -> dict:
    """The last `final` line of metrics.jsonl."""
    return [line for line in metrics(workdir) if line["split"] == "final"][-1]


def compare(left: storage.Path, right: storage.Path) -> list[str]:
    """What differs between two runs, down to the last bit: state, models, evaluations, report."""
    both = (left, right)
    problems = _differences("", *map(final_arrays, both))
    for name in ("model", "model_ema", "best"):
        if any((run / name).exists() for run in both):
            problems += _differences(f"{name}: ", *(model_arrays(run / name) for run in both))
    if final_report(left) != final_report(right):
        problems.append(f"final report: {final_report(left)} and {final_report(right)}")
    ours, theirs = ([x for x in metrics(run) if x["split"] == "eval"] for run in both)
    if ours != theirs:
        problems.append(f"evaluations: {ours} and {theirs}")
    return problems


def _differences(
    what: str, ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]
) -> list[str]:
    problems = [f"{what}only in one run: {name}" for name in ours.keys() ^ theirs.keys()]
    for name in ours.keys() & theirs.keys():
        if ours[name].tobytes() != theirs[name].tobytes():
            problems.append(f"{what}{name}: {np.sum(ours[name] != theirs[name])} elements differ")
    return problems


def run(
    kills: int, seed: int, workdir: storage.Path, flags: list[str], script: Path | str = "main.py"
) -> tuple[list[str], list[int]]:
    """One undisturbed run, and one with a kill in its teacher's training and `kills` in its own.

    Returns:
      What differs at the end, and the steps that the killed run resumed at.
    """
    peace, chaos = workdir / "undisturbed", workdir / "killed"
    start = functools.partial(launch, flags=flags, script=script)
    _, total = start(peace)
    draw = random.Random(seed)
    start(chaos, kill_at=-1, delay=draw.random())
    resumed = []
    for at in sorted(draw.sample(range(LOG_EVERY, total), kills)):
        resumed.append(start(chaos, kill_at=at, delay=draw.random() / 2)[0])
        print(f"resumed at step {resumed[-1]}, killed after step {at} of {total}", flush=True)
    resumed.append(start(chaos)[0])
    return compare(peace, chaos), resumed


def main() -> None:
    """Parses the flags and reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, required=True)
    arguments, flags = parser.parse_known_args()
    flags = flags or ["--config=configs/digits_distill.py"]
    problems, _ = run(arguments.kills, arguments.seed, arguments.workdir.absolute(), flags)
    if problems:
        sys.exit("\n".join(problems))
    print(f"bit-identical after {arguments.kills} kills")


if __name__ == "__main__":
    main()
