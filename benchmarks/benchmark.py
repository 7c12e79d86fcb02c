"""Measures how quickly this machine does the work of training, part by part.

python tools/benchmark.py input --config=deit_b --data ROOT --compare timm --cores 1
python tools/benchmark.py train --model deit_tiny_distilled_patch16_224 --batch 32 --compare torch
python tools/benchmark.py input --help

Parts: `input`, the pipeline that reads, decodes and augments images; `index`, how a large data set
opens; `train`, `infer` and `teacher`, the compiled steps; `device`, all that is worth knowing of a
GPU in 12 minutes. Each has its own flags, and all have --json, to print the report for programs,
and --write FILE, to put it into a Markdown file.
"""

import importlib
import sys

from deit_jax.cli.main import run_command
from deit_jax.cli.status import exit_status
from deit_jax.errors import InputError

STEP = "benchmarks.step"
PARTS = {
    "input": "benchmarks.input",
    "index": "benchmarks.index",
    "train": STEP,
    "infer": STEP,
    "teacher": STEP,
    "device": "benchmarks.device",
}


def main(argv: list[str] | None = None) -> int:
    """Measures a part; returns the exit status."""
    return exit_status(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> None:
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__, end="")
        return
    if name not in PARTS:
        raise InputError(f"the part to measure is {name!r}, expected one of {', '.join(PARTS)}")
    part = importlib.import_module(PARTS[name])
    run_command(part, name, rest, prog="python tools/benchmark.py")


if __name__ == "__main__":
    sys.exit(main())
