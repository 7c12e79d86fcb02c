"""Forecasts what a run's training step needs: memory, collectives, and roughly the time it takes.

All of it is read from the compiled step; nothing runs.
"""

import contextlib
import os
import re
import time
from collections.abc import Callable

import jax
import numpy as np

from deit_jax.checkpoints import model_folder
from deit_jax.console import log
from deit_jax.errors import InputError, brief
from deit_jax.models.info import ModelInfo
from deit_jax.models.network import Network, Variables
from deit_jax.parallel import hosts
from deit_jax.parallel.mesh import batch_sharding, device_bytes, replicated, with_shardings
from deit_jax.planning import chips, collectives, cycles, kernels, report
from deit_jax.planning.report import GIB, Report
from deit_jax.training import checks, loop, summary
from deit_jax.training.run import Run, matmuls
from deit_jax.training.setup import check, check_start, state_layout
from deit_jax.training.teacher import abstract_teacher


def plan(config: object, workdir: str) -> Report:
    """Prints what the run of `workdir` would need on these devices; trains and writes nothing.

    Raises:
      InputError: what would stop the run at its start.
    """
    run, first = check(config, workdir, mode="plan"), hosts.is_first()
    origin = "not started"
    if loop.holds_checkpoint(workdir):
        with contextlib.closing(loop.open_checkpoints(run, training=False)) as checkpoints:
            origin = f"goes on at step {checkpoints.latest_step()}"
    else:
        checks.check_place(workdir)
        if config.init_from:
            check_start(run, training=True)
    log(f"Plan of {workdir}\n{summary.describe_run(run, origin)}\n", on=first)
    if run.teacher_folder is not None and not model_folder.find_model(run.teacher_folder):
        recipe = config.distill.teacher_config
        log(f"Its teacher is trained first; plan that with --config={recipe}.\n", on=first)
    found = forecast(run, limit=device_memory())
    log("\n".join(report.lines(found)), on=first)
    return found


def device_memory() -> int | None:
    """Returns the bytes that one of these devices has; CPU devices share the machine's memory."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    if jax.default_backend() != "cpu":
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def forecast(
    run: Run,
    *,
    limit: int | None,
    teacher: str = "",
    kernel_cycles: Callable[[ModelInfo, str], dict[str, int]] | None = None,
) -> Report:
    """Compiles the training step for the mesh of `run` and reads the program.

    Args:
      run: a checked run; its mesh may be of devices that are not here.
      limit: bytes of memory of a device; None where it is not known.
      teacher: model of the teacher where the recipe names none.
      kernel_cycles: from the model and the program's text, the cycles of its kernels by name.

    Returns:
      What was compiled, and, ready for JSON: `state` (bytes per device by purpose), `memory` (the
      compiler's plan; None if it refused), `fits` (None: not known), `refusal`, `flops` and
      `bytes_accessed` per device and step, `collectives` (rows of `collectives.table`), `bounds`
      (seconds; {} where they cannot be estimated), `estimate` (see `estimate`; of a GPU
      `kernels.estimate`), and `host`.

    Raises:
      InputError: the recipe's backend is pmap, which compiles nothing ahead of time.
    """
    config, mesh = run.config, run.mesh
    if config.parallel.backend == "pmap":
        raise InputError(
            "config.parallel.backend is 'pmap', which cannot be compiled ahead of time; it needs "
            "the same memory as jit: plan with --config.parallel.backend=jit"
        )
    network, variables = abstract_teacher(run, teacher)
    step, arguments = abstract_step(run, network, variables)
    state, variables, batch = arguments
    kind = mesh.devices.flat[0].device_kind
    found = {
        "model": run.network.info.name,
        "teacher": network.info.name if network else None,
        "batch": config.train.batch_size,
        "image_size": config.input.image_size,
        "dtype": config.train.dtype,
        "remat": config.model.remat,
        "accumulate_steps": config.train.accumulate_steps,
        "device": kind,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "state": {
            "parameters": device_bytes(state.model),
            "optimizer": device_bytes(state.opt_state),
            "ema": device_bytes(state.ema),
            "teacher": device_bytes(variables),
            "batch": device_bytes(batch),
        },
        "limit": limit,
    }
    begin = time.perf_counter()
    with matmuls(config):
        lowered = step.lower(*arguments)
    try:
        compiled = lowered.compile()
        measured = kernel_cycles(run.network.info, compiled.as_text()) if kernel_cycles else {}
        found |= _program(compiled, mesh.size, chips.find(kind), found, measured)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found |= refused(error, found["state"])
    longest = max(found["bounds"].values(), default=None)
    image = config.input.image_size**2 * 3 + 4  # uint8 pixels and an int32 label
    return found | {
        "compile_s": time.perf_counter() - begin,
        "host": {  # what the hosts together must deliver
            "bytes_per_image": image,
            "bytes_per_step": image * found["batch"],
            "images_per_second": found["batch"] / longest if longest else None,
        },
    }


def abstract_step(
    run: Run, teacher: Network | None, teacher_variables: Variables | None
) -> tuple[object, tuple]:
    """Builds the jitted training step of a run, and the shapes that it is compiled for.

    Args:
      run: a checked run.
      teacher: the teacher's computation, or None.
      teacher_variables: the shapes of its weights, or None.

    Returns:
      The step, and its arguments (state, teacher's variables, batch) as ShapeDtypeStructs with
      their shardings on the run's mesh.
    """
    shapes, shardings = state_layout(run)
    everywhere = jax.tree.map(lambda _: replicated(run.mesh), teacher_variables)
    rows = batch_sharding(run.mesh)
    size, count = run.config.input.image_size, run.config.train.batch_size
    batch = {
        "image": jax.ShapeDtypeStruct((count, size, size, 3), np.uint8, sharding=rows),
        "label": jax.ShapeDtypeStruct((count,), np.int32, sharding=rows),
    }
    state = with_shardings(shapes, shardings)
    step = loop.jit_train_step(run, shardings, teacher)
    return step, (state, with_shardings(teacher_variables, everywhere), batch)


def _program(
    compiled: jax.stages.Compiled,
    num_devices: int,
    chip: chips.Chip | None,
    known: Report,
    kernel_cycles: dict[str, int],
) -> Report:
    """What the compiled program says of itself."""
    plan, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    memory = {
        "arguments": plan.argument_size_in_bytes,
        "outputs": plan.output_size_in_bytes - plan.alias_size_in_bytes,  # the rest is in place
        "temporaries": plan.temp_size_in_bytes,
        "program": plan.generated_code_size_in_bytes,
    }
    memory["total"] = sum(memory.values())
    text = compiled.as_text()
    crossing = collectives.read(text, num_devices)
    flops, accessed = cost.get("flops"), cost.get("bytes accessed")
    # The compiler counts the work of a loop, such as that over micro-batches, once.
    bounds = chip is not None and known["accumulate_steps"] == 1
    if chip and chip.products:
        expected = kernels.estimate(text, chip)
        flops, accessed, bounds = expected["flops"], expected["bytes"], True
    else:
        expected = estimate(chip, text, flops if bounds else None, kernel_cycles)
    return {
        "memory": memory,
        "refusal": None,
        "fits": memory["total"] <= known["limit"] if known["limit"] else None,
        "flops": flops,
        "bytes_accessed": accessed,
        "collectives": collectives.table(crossing),
        "bounds": roofline(chip, flops, accessed, crossing) if bounds else {},
        "estimate": expected,
    }


def estimate(
    chip: chips.Chip | None, text: str, flops: float | None, kernel_cycles: dict[str, int]
) -> dict:
    """Adds up the cycles that the TPU compiler expects of each operation.

    Args:
      chip: the device.
      text: of the compiled program.
      flops: of a step on a device; None where the compiler counts them in part.
      kernel_cycles: of kernels by name, which the text does not state.

    Returns:
      `seconds`, `mfu` (of the chip's stated rate; None without `flops`), `parts` (rows of
      `cycles.table`), `uncounted` (of `cycles.uncounted`) and `loops` of unknown length, counted
      once; {} where the compiler or the table of chips does not know.
    """
    operations, loops = cycles.read(text, kernel_cycles)
    total = sum(one.cycles or 0 for one in operations)
    if not (total and chip and chip.clock):
        return {}
    seconds = total / (chip.clock * 1e9)
    return {
        "seconds": seconds,
        "mfu": flops and flops / seconds / (chip.tflops * 1e12),
        "parts": cycles.table(operations),
        "uncounted": cycles.uncounted(operations),
        "loops": len(loops),
    }


def roofline(
    chip: chips.Chip, flops: float, accessed: float, found: list[collectives.Collective]
) -> dict[str, float]:
    """Estimates the seconds of each part of a step at the chip's stated rates, where known."""
    bounds = {"compute": flops / (chip.tflops * 1e12)}
    if chip.bandwidth:
        bounds["memory"] = accessed / (chip.bandwidth * 1e9)
    if chip.ring:
        bounds["communication"] = collectives.ring_seconds(found, chip.ring * 1e9)
    return bounds


# The TPU compiler states either all memory that the step needs, or the temporaries alone.
_NEEDED = re.compile(
    r"(Used |temporaries \()([\d.]+)([KMGT])\)? (?:of|exceeds available HBM) \(?([\d.]+)([KMGT])"
)


def refused(error: Exception, state: dict[str, int]) -> Report:
    """Returns what is known of a step that needs more memory than the compiler has.

    Args:
      error: the compiler's; its text is read, which an upgrade may change.
      state: bytes per device by purpose.
    """
    refusal = {"message": brief(error, 500), "used": None, "available": None}
    if match := _NEEDED.search(str(error)):
        what, used, unit, available, other_unit = match.groups()
        units = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
        beside = 0 if what == "Used " else sum(state.values())
        refusal["used"] = int(float(used) * units[unit]) + beside
        refusal["available"] = int(float(available) * units[other_unit])
    nothing = dict.fromkeys(("memory", "flops", "bytes_accessed"))
    nothing |= {"collectives": [], "bounds": {}, "estimate": {}}
    return nothing | {"refusal": refusal, "fits": False}
