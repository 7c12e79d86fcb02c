"""Measures how quickly this machine does the work of training, part by part.

python tools/benchmark.py input --config=configs/deit_b.py --data ROOT --compare timm --cores 1
python tools/benchmark.py train --model deit_tiny_distilled_patch16_224 --batch 32 --compare torch
python tools/benchmark.py input --help

Parts: `input`, the pipeline that reads, decodes and augments images; `train`, `infer` and
`teacher`, the compiled steps. Each has its own flags, and all have --json, to print the report for
programs, and --write FILE, to put it into a Markdown file.
"""

import importlib
import json
import os
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from deit_jax.cli.arguments import Parser  # noqa: E402
from deit_jax.cli.status import exit_status  # noqa: E402
from deit_jax.config.flags import parse  # noqa: E402
from deit_jax.errors import InputError  # noqa: E402
from deit_jax.planning.markdown import write_section  # noqa: E402

# Each module has a docstring for --help, USAGE, add_arguments(parser), run(arguments) → a report
# for JSON, and markdown(report, command) → the lines of its section.
STEP = "benchmarks.step"
PARTS = {"input": "benchmarks.input", "train": STEP, "infer": STEP, "teacher": STEP}
WITH_RECIPE = ("input",)


def main(argv: list[str] | None = None) -> int:
    """Measures a part; returns the exit status."""
    return exit_status(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> None:
    name = argv[0] if argv else ""
    if name in ("-h", "--help"):
        print(__doc__, end="")
        return
    if name not in PARTS:
        found = f"the part to measure is {name!r}" if name else "the part to measure is missing"
        raise InputError(f"{found}, expected one of {', '.join(PARTS)}; see --help")
    part = importlib.import_module(PARTS[name])
    parser = Parser(part.__doc__, part.USAGE)
    part.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the report for programs")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="also put the section into this Markdown file"
    )
    parser.set_defaults(part=name)
    if name in WITH_RECIPE:
        arguments = parse(parser, argv[1:])
    else:
        arguments = parser.parse_args(argv[1:])
    file = arguments.write
    # A place that cannot be written shows now, not after minutes.
    if file and (file.is_dir() or not os.access(file.absolute().parent, os.W_OK)):
        raise InputError(f"--write {file}: cannot be written; name a file in a folder that can")
    report = part.run(arguments)
    section = list(part.markdown(report, f"python tools/benchmark.py {shlex.join(argv)}"))
    print(json.dumps(report, indent=2) if arguments.json else "\n".join(section))
    if file:
        write_section(file, section)


if __name__ == "__main__":
    sys.exit(main())
