"""Writes a profile of a few compiled steps, and prints where their time goes.

python tools/profile_step.py train --model deit_tiny_distilled_patch16_224 --batch 32 --out DIR
python tools/profile_step.py infer --model deit_base_patch16_224 --batch 256 --out DIR

The steps are those of tools/benchmark.py, with its flags. TensorBoard (plug-in `xprof`) and
Perfetto show the files below DIR. The list sums the operations by name, over all threads and steps;
on CPU an operation's time includes waiting for a core.
"""

import collections
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402

from benchmarks import (  # noqa: E402
    programs,
    step,
)
from deit_jax.cli.arguments import Parser  # noqa: E402
from deit_jax.cli.status import exit_status  # noqa: E402
from deit_jax.errors import InputError  # noqa: E402
from deit_jax.parallel import cpu_memory  # noqa: E402

SHOWN = 15  # operations in the list


def operation_seconds(folder: Path) -> collections.Counter:
    """The seconds of every compiled operation of the latest profile below `folder`, by name."""
    latest = max(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    seconds = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(latest)).planes:
        for line in plane.lines:
            for event in line.events:
                if "hlo_op" in dict(event.stats):
                    seconds[event.name] += event.duration_ns / 1e9
    return seconds


def main() -> None:
    """Profiles and prints."""
    parser = Parser(__doc__)
    parser.add_argument("part", choices=step.PARTS)
    step.add_work_arguments(parser)
    parser.add_argument("--steps", type=int, default=3, help="steps to profile (default: 3)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where files go")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        raise InputError(f"--steps is {arguments.steps}, expected 1 or more")
    cpu_memory.keep_memory()
    program = programs.build(step.work_of(arguments))
    print(f"compiled in {program.compile_s:.1f} s", flush=True)
    program.run(1)
    with jax.profiler.trace(str(arguments.out)):
        for number in range(arguments.steps):
            with jax.profiler.StepTraceAnnotation(arguments.part, step_num=number):
                turn = program.turn(1)
            print(f"step {number}: {1e3 * turn.wall:.1f} ms, CPU {1e3 * turn.cpu:.1f} ms")
    seconds = operation_seconds(arguments.out)
    print(f"{seconds.total():.3f} s in {len(seconds)} operations; the longest of them:")
    for name, value in seconds.most_common(SHOWN):
        print(f"{1e3 * value / arguments.steps:10.2f} ms a step  {name}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
