"""Plans for a TPU slice that is not here: compiles a recipe's training step and says what it needs.

python tools/compile_for.py --config=configs/deit_b_distill.py --topology v5e:4x4
python tools/compile_for.py --config=configs/deit3.py:h --topology v5e:4x8 \\
    --config.parallel.fsdp=32 --config.model.remat=True --write docs/tpu.md

The step is the training loop's own, with the recipe's model, teacher, state and mesh, compiled by
the TPU compiler, which needs no TPU: pip install 'jax[tpu]'. It takes minutes. No data is read.

Memory and collectives are those of the compiled program. Times are estimates from the rates that
the chip's maker states: compute at the bfloat16 peak; the bytes that operations read and write, as
the compiler counts them (part of which never leaves the chip), at the memory's rate; collectives
one after the other, each as one ring over its devices on the links of one axis of the torus.
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

from deit_jax.config.flags import Parser, parse
from deit_jax.errors import InputError, exit_status


def main(argv: list[str] | None = None) -> int:
    """Compiles and prints; returns the exit status, 0 also where the step does not fit."""
    return exit_status(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> None:
    arguments = _parse(argv)
    from deit_jax.planning import topology
    from deit_jax.planning.markdown import write_section

    found = topology.forecast_slice(
        arguments.config,
        arguments.topology,
        teacher=arguments.teacher,
        num_train=arguments.train_images,
        num_classes=arguments.classes,
    )
    section = list(topology.lines(found, f"python tools/compile_for.py {shlex.join(argv)}"))
    print(json.dumps(found, indent=2) if arguments.json else "\n".join(section))
    if arguments.write:
        write_section(arguments.write, section)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--topology", required=True, metavar="KIND:SHAPE", help="v5e:4x4, v6e:4x4, v4:2x2x4, ...")
    add("--teacher", default="regnety_160", metavar="NAME", help="where the recipe names none")
    add("--classes", type=int, default=1000, help="(default: 1000)")
    add("--train-images", type=int, default=1_281_167, help="(default: 1281167)")
    add("--json", action="store_true", help="print the report for programs")
    add("--write", type=Path, metavar="FILE", help="also put the section into this Markdown file")
    arguments = parse(parser, argv)
    if arguments.config is None:
        raise InputError("--config is missing; name a recipe, as in --config=configs/deit_b.py")
    for name in ("classes", "train_images"):
        if getattr(arguments, name) < 1:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} is {getattr(arguments, name)}, expected 1 or more")
    file = arguments.write
    # A place that cannot be written shows now, not after minutes.
    if file and (file.is_dir() or not os.access(file.absolute().parent, os.W_OK)):
        raise InputError(f"--write {file}: cannot be written; name a file in a folder that can")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
