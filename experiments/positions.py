"""Compares positions on CIFAR-10: plain, rotary (axial, mixed), and registers with QK-norm.

python -m experiments.positions --data=cifar10 --workdir=runs/positions --write docs/experiments.md

DeiT III with four blocks of 64 channels and patches of 4 pixels, on a stratified part of the
training images, at their 32 pixels; the rotary models have no other positions. All models of a seed
see the same batches. Each is evaluated on all 10,000 test images at 32 pixels and, untuned, at 48.
--data holds train/ and val/ with a folder for each class. A run that was cut short goes on; the
figures of a finished one are kept beside it.
"""

import shlex
import statistics
import sys
from pathlib import Path

from ml_collections import ConfigDict

from deit_jax.cli.arguments import Parser, one_or_more
from deit_jax.cli.status import exit_status
from deit_jax.config.files import load_config
from deit_jax.console import log
from deit_jax.planning.markdown import around, origin, processor, table, write_between, written_by
from deit_jax.training import loop
from experiments import cells

MODELS = {  # what is changed in deit3_testing
    "plain": "",
    "RoPE axial": "rope=axial pos_embed=False",
    "RoPE mixed": "rope=mixed pos_embed=False",
    "4 registers, QK-norm": "num_registers=4 qk_norm=True",
}
SIZES = (32, 48)


def recipe(model: str, data: Path, seed: int, fraction: float, epochs: int) -> ConfigDict:
    """Returns the recipe of a key of MODELS: the digits' one, for photographs."""
    config = load_config("digits")
    config.dataset.update({"source": "folder", "root": str(data.absolute()), "eval_split": "val"})
    config.dataset.train_fraction = fraction
    config.model.update({"name": "deit3_testing", "patch_size": 4, "options": MODELS[model]})
    config.model.drop_path_rate = 0.0
    config.input.update({"pad": 4, "hflip": 0.5})
    config.mixing.update({"mixup_alpha": 0.0, "random_erasing": 0.0, "group_size": 64})
    config.optimizer.lr = 2e-3
    config.schedule.update({"epochs": epochs, "warmup_epochs": 2})
    config.train.update({"seed": seed, "ema_decay": 0.0, "eval_every_epochs": 0})
    config.checkpoint.every_epochs = 5
    return config


def measure(config: ConfigDict, workdir: Path) -> list[float]:
    """Trains in `workdir`; returns top-1 in percent at each of SIZES."""
    figures = [loop.train(config, str(workdir))["top1"]]
    for size in SIZES[1:]:
        config.init_from, config.input.image_size = str(workdir / "model"), size
        (elsewhere := workdir / f"at_{size}").mkdir(exist_ok=True)
        figures.append(loop.evaluate(config, str(elsewhere))["top1"])
    return figures


def main(argv: list[str] | None = None) -> int:
    """Trains what is missing and prints the table; returns the exit status."""
    return exit_status(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True)
    add("--workdir", type=Path, required=True)
    add("--seeds", type=int, nargs="+", default=[0, 1])
    add("--train_fraction", type=float, default=0.1)
    add("--epochs", type=one_or_more, default=16)
    help_text = "also put the table between <!-- positions --> and <!-- end of positions --> there"
    add("--write", type=Path, metavar="FILE", help=help_text)
    arguments = parser.parse_args(argv)
    if arguments.write:
        around(arguments.write, "positions")  # which says what is wrong before hours of training
    figures = {model: [] for model in MODELS}
    fraction, epochs = arguments.train_fraction, arguments.epochs
    for seed in arguments.seeds:
        for model in MODELS:
            folder = arguments.workdir.absolute() / f"seed{seed}" / model.replace(" ", "_")
            config = recipe(model, arguments.data, seed, fraction, epochs)
            found = cells.report(config, folder, lambda c=config, f=folder: measure(c, f))
            figures[model].append(found)
    rows = []
    for model, found in figures.items():
        means = [f"{statistics.mean(values):.2f}" for values in zip(*found, strict=True)]
        each = "; ".join(" → ".join(f"{value:.2f}" for value in values) for values in found)
        rows.append((model, f"`{MODELS[model]}`" if MODELS[model] else "", *means, each))
    command = f"python -m experiments.positions {shlex.join(argv)}"
    what = (
        f"Top-1 in percent after {epochs} epochs of {100 * fraction:g} % of the training images, "
    )
    what += f"seeds {', '.join(map(str, arguments.seeds))}."
    columns = ["model", "options", *(f"at {size} pixels" for size in SIZES), "each seed"]
    section = [
        *written_by(command, origin("jax", "flax", "tensorflow"), processor()),
        *(what, ""),
        *table(*columns, rows=rows),
    ]
    log("\n".join(section))
    if arguments.write:
        write_between(arguments.write, "positions", section)


if __name__ == "__main__":
    sys.exit(main())
