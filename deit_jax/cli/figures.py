"""The one look of all figures: colours, sizes, and files that are the same for the same data."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from deit_jax import storage
from deit_jax.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
# Of Okabe and Ito: also people who confuse colours tell them apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LOOK = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.dpi": 150,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 3,
    "svg.hashsalt": "deit-jax",  # else its ids are drawn at random
}


def check(out: storage.Path) -> None:
    """Raises InputError where no figure could be written: another suffix, or no matplotlib."""
    if out.suffix.lower() not in SUFFIXES:
        raise InputError(f"--out is {out}, expected a name that ends in {' or '.join(SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("figures need matplotlib; pip install 'deit-jax[plot]'")


@contextmanager
def new_figure(out: storage.Path, width: float, height: float) -> Iterator["Figure"]:
    """Gives a figure of the common look to draw on, and writes it at the end.

    Args:
      out: PNG or SVG, which `check` has passed; may be in a bucket.
      width: inches.
      height: inches.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_LOOK):
        figure = Figure(figsize=(width, height), layout="constrained")  # needs no screen
        yield figure
        kind = out.suffix.lower()[1:]
        dated = {"metadata": {"Date": None}} if kind == "svg" else {}
        with storage.uploaded(out) as file:
            figure.savefig(file, format=kind, **dated)
