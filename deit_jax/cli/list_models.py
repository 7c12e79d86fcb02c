"""Lists the models, with their parameters and image sizes.

deit-jax list-models
deit-jax list-models 'deit3*'
deit-jax list-models 'regnety_*' --json

The parameters are those of a model with 1000 classes. Each name is what --config.model.name and
deit_jax.create_model take.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable

from deit_jax.console import log
from deit_jax.errors import InputError

RECIPE = ""


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the flags."""
    parser.add_argument("pattern", nargs="?", default="*", help="shell pattern (default: all)")


def run(arguments: Namespace, emit: Callable[[object], None]) -> None:
    """Lists them."""
    from deit_jax import trees
    from deit_jax.models import registry
    from deit_jax.models.network import split_model

    names = registry.list_models(arguments.pattern)
    if not names:
        raise InputError(f"no model matches {arguments.pattern!r}; deit-jax list-models lists all")
    models = []
    for name in names:
        network, variables = split_model(registry.abstract_model(name))
        parameters, size = trees.param_count(variables.params), network.info.image_size
        log(f"{name:34}{parameters:>13,} parameters  {size}×{size}")
        models.append({"name": name, "parameters": parameters, "image_size": size})
    emit(models)
