"""Plans for devices that are not here: compiles a recipe's training step, says what it needs.

deit-jax compile-for --config=deit_b_distill --topology v5e:4x4
deit-jax compile-for --config=deit3:h --topology v5e:4x8 \\
    --config.parallel.fsdp=32 --config.model.remat=True --write docs/tpu.md
deit-jax compile-for --config=deit_b --topology cuda:H200x8

The step is the training loop's own, with the recipe's model, teacher, state and mesh, compiled by
the TPU compiler, which needs no TPU (pip install 'jax[tpu]'), or by XLA's compiler for GPUs, which
needs no GPU (pip install 'jax[cuda13-local]'). It takes minutes. No data is read.

docs/tpu.md and docs/gpu.md explain the report, and what the estimates of time leave out.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable

from deit_jax.cli.arguments import new_file, one_or_more

RECIPE = "required"


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the flags."""
    add = parser.add_argument
    add("--topology", required=True, metavar="KIND:SHAPE", help="v5e:4x4, v4:2x2x4, cuda:H200x8")
    add("--teacher", default="regnety_160", metavar="NAME", help="where the recipe names none")
    add("--classes", type=one_or_more, default=1000, metavar="N", help="(default: 1000)")
    add("--train_images", type=one_or_more, default=1_281_167, metavar="N", help="(ImageNet's)")
    add("--write", type=new_file, metavar="FILE", help="also put the report into a Markdown file")


def run(arguments: Namespace, emit: Callable[[object], None]) -> None:
    """Compiles and reports, also where the step does not fit."""
    from deit_jax.planning import topology
    from deit_jax.planning.markdown import publish

    found = topology.forecast_slice(
        arguments.config,
        arguments.topology,
        teacher=arguments.teacher,
        num_train=arguments.train_images,
        num_classes=arguments.classes,
    )
    publish(topology.lines(found, arguments.command_line), arguments.write)
    emit(found)
