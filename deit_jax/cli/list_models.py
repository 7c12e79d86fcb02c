"""Lists the models by family: parameters, image size, GMACs, published top-1 and weights.

deit-jax list-models
deit-jax list-models 'deit3*'
deit-jax list-models '*testing*' --json

The parameters are those of a model with 1000 classes, the top-1 that of its authors' weights on
ImageNet-1k, in percent; hf:OWNER/NAME is what `deit-jax convert --src` takes. Each name is what
--config.model.name and deit_jax.create_model take. Small models for tests are shown on request.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from itertools import groupby

from deit_jax.console import log
from deit_jax.errors import InputError

RECIPE = ""


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the flags."""
    parser.add_argument("pattern", nargs="?", default="*", help="shell pattern (default: all)")


def run(arguments: Namespace, emit: Callable[[object], None]) -> None:
    """Lists them."""
    from deit_jax.models import registry

    rows = registry.list_models(arguments.pattern, details=True)
    if not rows:
        wider = f"*{arguments.pattern}*"
        near = f", but some match {wider!r}" if registry.list_models(wider) else ""
        raise InputError(
            f"no model matches {arguments.pattern!r}{near}; deit-jax list-models lists all"
        )
    by_family = sorted(rows, key=lambda row: row.family)
    for family, members in groupby(by_family, key=lambda row: row.family):
        log(family)
        for row in members:
            size = f"{row.image_size}×{row.image_size}"
            top1 = "" if row.top1 is None else f"top-1 {row.top1:.1f}"
            line = (
                f"  {row.name:36}{row.parameters:>13,} parameters  {size}  {row.gmacs:>6.2f} GMACs"
            )
            log(f"{line}  {top1:10}  {row.weights}".rstrip())
    emit([row._asdict() for row in rows])
