"""Compares a student without teacher, with hard and with soft distillation, over several seeds.

python -m experiments.distillation_table --workdir=runs/table
python -m experiments.distillation_table --workdir=runs/table_tenth --train_fraction=0.1

Every seed trains its own teacher, on the same images as the students; all students train for the
same number of epochs. A run that is there goes on, or, finished, is evaluated again. Prints a
Markdown table row per method: mean ± standard deviation of top-1 (percent) over the seeds, and each
seed's figure.
"""

import contextlib
import statistics
import sys
from pathlib import Path

from deit_jax.cli.arguments import Parser, one_or_more
from deit_jax.cli.status import exit_status
from deit_jax.config.files import changed_fields, load_config
from deit_jax.console import log_error
from deit_jax.errors import InputError
from deit_jax.planning.markdown import table
from deit_jax.training import loop

METHODS = {  # a recipe, and what it changes; the teacher comes first
    "teacher": ("digits_teacher", {}),
    "plain student": ("digits", {}),
    "hard distillation": ("digits_distill", {}),
    "soft distillation": (
        "digits_distill",
        {  # weight and temperature of the paper, section 4
            "distill.kind": "soft",
            "distill.alpha": 0.1,
            "distill.temperature": 3.0,
            "distill.reduction": "batchmean",
        },
    ),
}


def train(method: str, folder: Path, fields: dict[str, object], epochs_factor: int) -> float:
    """Returns the final top-1 of a method's run in `folder`, which has its teacher's run beside it.

    Raises:
      InputError: the folder holds a run with other fields.
    """
    recipe, changes = METHODS[method]
    workdir = folder / method.replace(" ", "_")
    config = load_config(recipe)
    config.update_from_flattened_dict(changes | fields)
    config.schedule.epochs *= epochs_factor
    if recipe == "digits_distill":
        config.distill.teacher = str(folder / "teacher")
    if changed := changed_fields(config, str(workdir)):
        raise InputError(f"{workdir} holds another run ({changed[0]}); choose another --workdir")
    log_error(f"training {workdir}")
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
        return loop.train(config, str(workdir))["top1"]


def main(argv: list[str] | None = None) -> int:
    """Trains what is missing and prints the table; returns the exit status."""
    return exit_status(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--workdir", type=Path, required=True)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--train_fraction", type=float, default=1.0)
    add("--epochs_factor", type=one_or_more, default=1, help="times the recipes' epochs")
    arguments = parser.parse_args(argv)
    figures: dict[str, list[float]] = {name: [] for name in METHODS}
    for seed in arguments.seeds:
        fields = {"train.seed": seed, "dataset.train_fraction": arguments.train_fraction}
        folder = arguments.workdir.absolute() / f"seed{seed}"
        for method in METHODS:
            figures[method].append(train(method, folder, fields, arguments.epochs_factor))
    rows = []
    for name, values in figures.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        each = ", ".join(f"{value:.2f}" for value in values)
        rows.append((name, f"{statistics.mean(values):.2f} ± {spread:.2f}", each))
    title = f"top-1, mean ± sd of {len(arguments.seeds)} seeds"
    print("\n".join(table("", title, "each seed", rows=rows)))


if __name__ == "__main__":
    sys.exit(main())
