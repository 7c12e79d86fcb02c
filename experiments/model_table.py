"""Writes the tables of models into Markdown, and counts what `models/figures.py` says of them.

python -m experiments.model_table --write docs/models.md
python -m experiments.model_table --families --write README.md
python -m experiments.model_table --count deit3_base_patch16_224

A table stands between two comments, `<!-- models -->` and `<!-- end of models -->`, or those of
`families`. `--count` prints parameters and GMACs of one image, as a new row of `figures.py` needs
them: products of all matrix multiplications and convolutions of an evaluation.
"""

import math
import sys
from itertools import groupby
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.extend import core

from deit_jax import trees
from deit_jax.cli.arguments import Parser
from deit_jax.cli.status import exit_status
from deit_jax.models import registry
from deit_jax.models.network import split_model
from deit_jax.planning.markdown import table, write_between


def count(name: str) -> tuple[int, float]:
    """Returns a model's parameters and its GMACs for one image, from shapes alone."""
    network, variables = split_model(registry.abstract_model(name))
    size = network.info.image_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    program = jax.make_jaxpr(lambda variables, image: network(variables, image)[0])
    return trees.param_count(variables.params), _macs(program(variables, image).jaxpr) / 1e9


def _macs(program: core.Jaxpr) -> int:
    total = 0
    for equation in program.eqns:
        out, name = equation.outvars[0].aval, equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval
            total += out.size * math.prod(left.shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            outputs = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
            total += out.size * kernel.size // outputs
        else:
            inner = [_macs(each) for each in _programs(equation.params)]
            # Of branches for several platforms, one runs.
            total += max(inner, default=0) if name == "cond" else sum(inner)
    return total


def _programs(params: dict[str, object]) -> list[core.Jaxpr]:
    found = []
    for value in params.values():
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, core.ClosedJaxpr):
                found.append(each.jaxpr)
            elif isinstance(each, core.Jaxpr):
                found.append(each)
    return found


def lines() -> list[str]:
    """Returns the table in Markdown, a row for each model."""
    rows = [
        (
            f"`{row.name}`", f"{row.parameters / 1e6:.1f}", str(row.image_size), f"{row.gmacs:.2f}",
            f"{row.top1:.1f}" if row.top1 else "", f"`{row.weights}`" if row.weights else "",
        )
        for row in registry.list_models(details=True)
    ]  # fmt: skip
    return list(table("model", "M parameters", "pixels", "GMACs", "top-1", "weights", rows=rows))


def families() -> list[str]:
    """Returns a table in Markdown with a row for each family."""

    def extent(numbers: list[float]) -> str:
        ends = dict.fromkeys(f"{end(numbers):.1f}" for end in (min, max)) if numbers else {}
        return "–".join(ends)

    rows = []
    models = sorted(registry.list_models(details=True), key=lambda row: row.family)
    for family, group in groupby(models, key=lambda row: row.family):
        members = list(group)
        sizes = extent([row.parameters / 1e6 for row in members])
        top1 = extent([row.top1 for row in members if row.top1])
        weights = sum(bool(row.weights) for row in members)
        rows.append((family, len(members), sizes, top1, weights or "", f"`{members[0].name}`"))
    columns = ("family", "models", "M parameters", "top-1", "published weights", "one of them")
    return list(table(*columns, rows=rows))


def _run(argv: list[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table into this file")
    parser.add_argument("--count", nargs="+", default=[], metavar="NAME", help="count these models")
    parser.add_argument("--families", action="store_true", help="a row for each family")
    arguments = parser.parse_args(argv)
    name, rows = ("families", families()) if arguments.families else ("models", lines())
    for model in arguments.count:
        parameters, gmacs = count(model)
        print(f"{model}: {parameters:_}, {gmacs:.2f}")
    if arguments.write:
        write_between(arguments.write, name, rows)
    elif not arguments.count:
        print("\n".join(rows))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return exit_status(lambda: _run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
