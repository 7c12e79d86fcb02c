"""Draws the curves of one or several runs: loss, accuracy, learning rate and throughput.

deit-jax plot runs/digits
deit-jax plot runs/plain runs/distilled gs://bucket/runs/soft --out compare.svg

A run is a folder with a metrics.jsonl, also while it trains, and may be in a bucket. Each run has a
colour. The accuracy is top-1 on the eval split: of a distilled model the mean of the two heads'
logits, and each head alone; of the EMA of the weights, if there is one; and of the teacher. The
axis shows epochs, or steps where a run has not written its epochs. Needs matplotlib (pip install
'deit-jax[plot]').
"""

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from deit_jax import storage
from deit_jax.cli import figures
from deit_jax.cli.arguments import a_path, new_file
from deit_jax.console import log, log_error
from deit_jax.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RECIPE = ""
FILE = "metrics.jsonl"
_TEXTS = ("split", "data")  # what is no number in its lines

Line = dict[str, Any]  # of that file

# The panels and their curves: the split, the value, its words and how it is drawn.
_FAINT, _MARKED = {"alpha": 0.4}, {"marker": "o"}
PANELS = {
    "loss": (("train", "loss", "train", _FAINT), ("eval", "loss", "eval", _MARKED)),
    "top-1, %": (
        ("eval", "top1", "top-1", _MARKED),
        ("eval", "top1_cls", "class head", {"linestyle": "--"}),
        ("eval", "top1_dist", "distillation head", {"linestyle": ":"}),
        ("eval", "ema_top1", "EMA", {"alpha": 0.5}),
        ("final", "teacher_top1", "teacher", {"linestyle": "-."}),
    ),
    "learning rate": (("train", "learning_rate", "", {}),),
    "images/s": (("train", "images_per_second", "", {}),),
}


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the flags."""
    add = parser.add_argument
    add("runs", nargs="+", type=a_path, metavar="RUN", help="folder of a run")
    add("--out", type=new_file, default="curves.png", metavar="FILE", help="(default: curves.png)")


def run(arguments: Namespace, emit: Callable[[object], None]) -> None:
    """Draws."""
    figures.check(arguments.out)
    most = len(figures.COLOURS)
    if len(arguments.runs) > most or len(set(arguments.runs)) < len(arguments.runs):
        raise InputError(f"{len(arguments.runs)} runs, expected at most {most}, each named once")
    runs = dict(zip(names(arguments.runs), map(read, arguments.runs), strict=True))
    colours = dict(zip(runs, figures.COLOURS, strict=False))
    known = all("epoch" in line for lines in runs.values() for line in lines)
    axis = "epoch" if known else "step"
    with figures.new_figure(arguments.out, 9, 6) as figure:
        panels = figure.subplots(2, 2).flat
        for axes, (title, curves) in zip(panels, PANELS.items(), strict=True):
            drawn = {}
            for name, lines in runs.items():
                for split, key, words, how in curves:
                    if points := curve(lines, split, key, axis):
                        drawn[words] = _line(how)
                        _draw(axes, points, key, {"color": colours[name]} | how)
            axes.set(title=title, xlabel=axis)
            if any(drawn):
                axes.legend(drawn.values(), drawn)
        samples = [_line({"color": colour}) for colour in colours.values()]
        figure.legend(samples, runs, loc="outside upper center", ncols=min(len(runs), 4))
    log(f"{arguments.out}: {', '.join(runs)}")
    emit({"out": str(arguments.out), "runs": [str(path) for path in arguments.runs], "axis": axis})


def read(folder: storage.Path) -> list[Line]:
    """Returns the lines of a run's metrics.jsonl, in its order.

    A line that is cut short, as a crash leaves it, is left out, and said.

    Raises:
      InputError: no such file, or nothing in it.
    """
    path = folder / FILE
    try:
        texts = storage.read_bytes(path).decode(errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{folder} holds no {FILE}; name the folder of a run") from None
    lines = []
    for text in texts:
        try:
            line = storage.parse_json(text)
            places = [line["step"], line.get("epoch", 0)]
            values = (line[name] for name in line if name not in _TEXTS and line[name] is not None)
            if all(isinstance(value, (int, float)) for value in (*places, *values)):
                lines.append(line | {"split": line["split"]})
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    if len(lines) < len(texts):
        log_error(f"note: {path}: left out {len(texts) - len(lines)} line(s) that are no metrics")
    if not lines:
        raise InputError(f"{path} holds no metrics yet; the first come after some steps")
    return lines


def names(folders: list[storage.Path]) -> list[str]:
    """Returns short names of runs: the last part of the path, or all of it where two share that."""
    last = [folder.name for folder in folders]
    return [
        name if last.count(name) == 1 else str(folder)
        for name, folder in zip(last, folders, strict=True)
    ]


def curve(lines: list[Line], split: str, key: str, axis: str) -> list[tuple[float, float]]:
    """Returns the points of a value; NaN where a line says null, which was no finite number."""
    found = (line for line in lines if line["split"] == split and key in line)
    return [(line[axis], math.nan if line[key] is None else line[key]) for line in found]


def _draw(axes: "Axes", points: list[tuple[float, float]], key: str, how: dict) -> None:
    if key == "teacher_top1":  # the same at any time
        axes.axhline(points[-1][1], **how)
    else:
        axes.plot(*zip(*points, strict=True), **how)


def _line(how: dict) -> object:
    """A sample for a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], **({"color": "#444444"} | how))
