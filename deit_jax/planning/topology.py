"""Plans for TPUs and GPUs that are not here: their compilers do not need them."""

import contextlib
import functools
import os
import shlex
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from deit_jax.config.plan import check_batch, plan_run
from deit_jax.models import registry
from deit_jax.parallel.mesh import make_mesh
from deit_jax.planning import chips, cuda, forecast, markdown, report, tpu, tpu_kernels
from deit_jax.training.complete import complete
from deit_jax.training.setup import assemble, check_model


def forecast_slice(
    config: ConfigDict, topology: str, *, teacher: str, num_train: int, num_classes: int
) -> report.Report:
    """Compiles a recipe's training step for absent devices; takes minutes and reads no data.

    Args:
      config: the recipe.
      topology: "KIND:SHAPE", such as "v5e:4x4" or "cuda:H200x8".
      teacher: model of the teacher where the recipe names none.
      num_train: images of the train split.
      num_classes: classes of the data.

    Returns:
      The forecast, `topology`, `date` and `versions`.

    Raises:
      InputError: the recipe is wrong, the slice is unknown, or the compiler is not installed.
    """
    on_gpu = topology.startswith("cuda:")
    devices = (cuda if on_gpu else tpu).devices(topology)
    config = complete(config)
    hosts = len({device.process_index for device in devices})
    check_batch(config, num_devices=len(devices), num_processes=hosts)
    check_model(config, devices[0].platform)
    registry.model_options(teacher)  # raises for an unknown name
    counts = {"num_train": num_train, "num_classes": num_classes, "num_devices": len(devices)}
    plan = plan_run(config, **counts)
    run = assemble(config, "", plan, make_mesh(config.parallel.fsdp, devices))
    chip = chips.find(devices[0].device_kind)
    limit = int(chip.memory * report.GIB) if chip else None
    cycles = None if on_gpu else functools.partial(tpu_kernels.measure, topology)
    with without_cache():
        found = forecast.forecast(run, limit=limit, teacher=teacher, kernel_cycles=cycles)
    compiler = "jax-cuda13-plugin" if on_gpu else "libtpu"
    packages = ("jax", "jaxlib", compiler, "flax", "optax")
    return found | {"topology": topology, **markdown.origin(*packages)}


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
    """Keeps programs for absent devices out of JAX's cache, which cannot read them back."""
    before = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # it looks at the switch once
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def lines(found: report.Report, command: str) -> Iterator[str]:
    """Yields the Markdown section of a forecast; the first line is the heading."""
    variable = "XLA_FLAGS" if found["topology"].startswith("cuda:") else "LIBTPU_INIT_ARGS"
    fsdp, flags = found["mesh"]["fsdp"], os.environ.get(variable)
    ways = [f"fsdp {fsdp}"] if fsdp > 1 else []
    ways += [*report.memory_savers(found)]
    if flags:  # the compilers take them from the environment
        ways.append("the compiler's flags below")
        command = f"{variable}={shlex.quote(flags)} {command}"
    how = f", with {', '.join(ways)}" if ways else ""
    title = f"{found['model']}, {found['batch']} images, on {found['topology']}{how}"
    yield from markdown.head(title, command, found)
    yield from report.lines(found)
    if found["topology"].startswith("cuda:") and (note := cuda.memory_note(found)):
        yield from ("", note)
