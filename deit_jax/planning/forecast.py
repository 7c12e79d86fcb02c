"""What a run's training step will need: memory, exchanges, and about how long it takes.

All of it is read from the compiled step; nothing runs.
"""

import contextlib
import math
import os
import re
import time
from collections.abc import Iterator

import jax
import numpy as np

from deit_jax.checkpoints import model_folder
from deit_jax.console import log
from deit_jax.errors import InputError, brief
from deit_jax.parallel import hosts
from deit_jax.parallel.mesh import FSDP, batch_sharding, device_bytes, replicated, with_shardings
from deit_jax.planning import chips, collectives
from deit_jax.training import checks, loop, summary
from deit_jax.training.run import Run
from deit_jax.training.setup import check, check_start, state_layout
from deit_jax.training.teacher import abstract_teacher

GIB = 2**30
Report = dict[str, object]


def plan(config: object, workdir: str) -> Report:
    """Prints what the run of `workdir` would need on these devices; trains and writes nothing.

    Raises:
      InputError: what would stop the run at its start.
    """
    run = check(config, workdir, mode="plan")
    origin = "not started"
    if loop.holds_checkpoint(workdir):
        with contextlib.closing(loop.open_checkpoints(run, training=False)) as checkpoints:
            origin = f"goes on at step {checkpoints.latest_step()}"
    else:
        checks.check_place(workdir)
        if config.init_from:
            check_start(run, training=True)
    log(f"Plan of {workdir}\n{summary.describe_run(run, origin)}\n", on=hosts.is_first())
    if run.teacher_folder is not None and not model_folder.find_model(run.teacher_folder):
        recipe = config.distill.teacher_config
        log(
            f"Its teacher is trained first; plan that with --config={recipe}.\n",
            on=hosts.is_first(),
        )
    report = forecast(run, limit=device_memory())
    log("\n".join(lines(report)), on=hosts.is_first())
    return report


def device_memory() -> int | None:
    """Bytes that one of this machine's devices has; CPU devices share the machine's memory."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    if jax.default_backend() != "cpu":
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def forecast(run: Run, *, limit: int | None, teacher: str = "") -> Report:
    """Compiles the training step for the mesh of `run` and reads the program.

    Args:
      run: a checked run; its mesh may be of devices that are not here.
      limit: bytes of memory of a device; None where it is not known.
      teacher: model of the teacher where the recipe names none.

    Returns:
      `state` (bytes on a device by what they are), `memory` (the compiler's plan; None if it
      refused), `fits` (None: not known), `refusal`, `flops` and `bytes_accessed` of a device,
      `collectives`, `bounds` (seconds; {} for an unknown chip), `host`, and what was compiled.

    Raises:
      InputError: the recipe's backend is pmap, which compiles nothing ahead.
    """
    config, mesh = run.config, run.mesh
    everywhere, rows = replicated(mesh), batch_sharding(mesh)
    if config.parallel.backend != "mesh":
        raise InputError(
            f"config.parallel.backend is {config.parallel.backend!r}, but only the step over a "
            "mesh can be compiled ahead; it needs the same memory: plan with "
            "--config.parallel.backend=mesh"
        )
    shapes, shardings = state_layout(run)
    state = with_shardings(shapes, shardings)
    network, variables = abstract_teacher(run, teacher)
    variables = with_shardings(variables, jax.tree.map(lambda _: everywhere, variables))
    size, count = config.input.image_size, config.train.batch_size
    batch = {
        "image": jax.ShapeDtypeStruct((count, size, size, 3), np.uint8, sharding=rows),
        "label": jax.ShapeDtypeStruct((count,), np.int32, sharding=rows),
    }
    device = mesh.devices.flat[0]
    report = {
        "model": run.network.info.name,
        "teacher": network.info.name if network else None,
        "batch": count,
        "image_size": size,
        "dtype": config.train.dtype,
        "remat": config.model.remat,
        "accumulate_steps": config.train.accumulate_steps,
        "device": device.device_kind,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "state": {
            "parameters": device_bytes(state.model),
            "optimizer": device_bytes(state.opt_state),
            "moving_average": device_bytes(state.ema),
            "teacher": device_bytes(variables),
            "batch": device_bytes(batch),
            "gradients": device_bytes(state.model.params),
        },
        "limit": limit,
    }
    step = loop.jit_train_step(run, shardings, network)
    begin = time.perf_counter()
    lowered = step.lower(state, variables, batch)
    try:
        compiled, refusal = lowered.compile(), None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        compiled, refusal = None, error
    report["compile_s"] = time.perf_counter() - begin
    report |= _program(compiled, mesh.size) if compiled else _refused(refusal, report["state"])
    report["fits"] = _fits(report)
    report["bounds"] = _bounds(report, chips.find(device.device_kind))
    report["host"] = _host(report)
    return report


def _program(compiled: jax.stages.Compiled, num_devices: int) -> Report:
    plan, cost = compiled.memory_analysis(), compiled.cost_analysis()
    memory = {
        "arguments": plan.argument_size_in_bytes,
        "outputs": plan.output_size_in_bytes,
        "aliased": plan.alias_size_in_bytes,
        "temporaries": plan.temp_size_in_bytes,
        "program": plan.generated_code_size_in_bytes,
    }
    memory["total"] = sum(memory.values()) - 2 * memory["aliased"]
    return {
        "memory": memory,
        "refusal": None,
        "flops": cost.get("flops"),
        "bytes_accessed": cost.get("bytes accessed"),
        "collectives": collectives.read(compiled.as_text(), num_devices),
    }


# Two ways in which the TPU compiler says so: of all memory, and of the temporaries alone.
_USED = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm")
_TEMPORARIES = re.compile(
    r"temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)"
)


def _refused(error: Exception, state: dict[str, int]) -> Report:
    """What is known where the compiler found that the step needs too much memory."""
    units = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    refusal = {"message": brief(error, 500), "used": None, "available": None}
    for pattern in (_USED, _TEMPORARIES):
        if match := pattern.search(str(error)):
            refusal["used"] = int(float(match[1]) * units[match[2]])
            refusal["available"] = int(float(match[3]) * units[match[4]])
            if pattern is _TEMPORARIES:
                refusal["used"] += sum(state.values()) - state["gradients"]
    nothing = dict.fromkeys(("memory", "flops", "bytes_accessed"))
    return nothing | {"collectives": [], "refusal": refusal}


def _fits(report: Report) -> bool | None:
    if report["refusal"]:
        return False
    return report["memory"]["total"] <= report["limit"] if report["limit"] else None


def _bounds(report: Report, chip: chips.Chip | None) -> dict[str, float]:
    """Estimated seconds of a step's arithmetic, its memory traffic and its exchanges."""
    if chip is None or report["memory"] is None or report["accumulate_steps"] > 1:
        return {}  # the compiler counts the work of a loop once
    return roofline(chip, report["flops"], report["bytes_accessed"], report["collectives"])


def roofline(
    chip: chips.Chip, flops: float, accessed: float, found: list[collectives.Collective]
) -> dict[str, float]:
    """Seconds for each part of a step at the chip's stated rates, without those we do not know."""
    bounds = {"arithmetic": flops / (chip.tflops * 1e12)}
    if chip.bandwidth:
        bounds["memory"] = accessed / (chip.bandwidth * 1e9)
    if chip.ring:
        bounds["exchange"] = collectives.ring_seconds(found, chip.ring * 1e9)
    return bounds


def _host(report: Report) -> dict[str, float | None]:
    """What the hosts together must deliver; the rate is that of the estimated step."""
    longest = max(report["bounds"].values(), default=None)
    image = report["image_size"] ** 2 * 3 + 4
    return {
        "bytes_per_image": image,
        "bytes_per_step": image * report["batch"],
        "images_per_second": report["batch"] / longest if longest else None,
    }


def lines(report: Report) -> Iterator[str]:
    """The report as Markdown, without a heading."""
    axes = " × ".join(f"{name} {size}" for name, size in report["mesh"].items())
    teacher = f", taught by {report['teacher']}" if report["teacher"] else ""
    ways = [report["dtype"], f"{report['batch']} images", axes]
    ways += ["remat"] if report["remat"] else []
    if report["accumulate_steps"] > 1:
        ways.append(f"{report['accumulate_steps']} micro-batches")
    yield f"{report['model']} at {report['image_size']} pixels{teacher}; {', '.join(ways)};"
    yield f"{report['devices']} × {report['device']}. Compiled in {report['compile_s']:.0f} s."
    yield ""
    yield from _memory_lines(report)
    if report["memory"] is not None:
        yield ""
        yield from _exchange_lines(report["collectives"])
        yield ""
        yield from _time_lines(report)
    yield ""
    host = report["host"]
    line = (
        f"Input: {host['bytes_per_image']:,} bytes an image, {host['bytes_per_step'] / 1e6:.1f} MB "
        "a step; "
    )
    if host["images_per_second"]:
        yield line + f"that step takes {host['images_per_second']:,.0f} images/s of all hosts."
    else:
        yield line + f"a step of S seconds takes {report['batch']:,} / S images/s of all hosts."


def _memory_lines(report: Report) -> Iterator[str]:
    state, memory, limit = report["state"], report["memory"], report["limit"]
    rows = {name.replace("_", " "): size for name, size in state.items() if size}
    gradients = rows.pop("gradients")
    if memory is None:
        rows["gradients"] = gradients
    else:
        rows |= {
            "**arguments**: all of these, as the compiler lays them out": memory["arguments"],
            "**outputs** beyond the arguments' place": max(
                0, memory["outputs"] - memory["aliased"]
            ),
            "**temporaries**: activations, gradients and the like": memory["temporaries"],
            "**program**": memory["program"],
            "**total**": memory["total"],
        }
    if limit:
        shared = ", its share of the machine's memory" if report["device"] == "cpu" else ""
        rows[f"the device has{shared}"] = limit
    yield "| memory of a device | GiB | bytes |"
    yield "|---|---|---|"
    for name, size in rows.items():
        yield f"| {name} | {size / GIB:.2f} | {size:,} |"
    if memory is not None:
        yield ""
        yield f"The gradients among the temporaries are {gradients / GIB:.2f} GiB."
    yield ""
    yield _verdict(report)


def _verdict(report: Report) -> str:
    if report["fits"] is None:
        return "Whether it fits is not known: the device does not say how much memory it has."
    if report["fits"]:
        return "**Fits.**"
    remedies = f"Try {' or '.join(_remedies(report))}."
    refusal, limit = report["refusal"], report["limit"]
    if refusal is None:
        over = (report["memory"]["total"] - limit) / GIB
        return f"**Does not fit: {over:.2f} GiB over.** {remedies}"
    over = ""
    if refusal["used"] is not None:
        over = f": {(refusal['used'] - refusal['available']) / GIB:.2f} GiB over"
    return f"**Does not fit{over}.** {remedies} The compiler: {refusal['message']}"


def _remedies(report: Report) -> Iterator[str]:
    fsdp = report["mesh"][FSDP]
    devices = report["devices"]
    if fsdp < devices:
        eight = math.gcd(devices, 8)
        yield f"--config.parallel.fsdp={eight if fsdp < eight else devices}"
    if not report["remat"]:
        yield "--config.model.remat=True"
    if report["accumulate_steps"] == 1:
        yield "--config.train.accumulate_steps=2"
    yield "a smaller --config.train.batch_size"


def _exchange_lines(found: list[collectives.Collective]) -> Iterator[str]:
    if not found:
        yield "Nothing crosses between devices."
        return
    yield "| between devices | where | devices | operations a step | MB |"
    yield "|---|---|---|---|---|"
    for row in collectives.table(found):
        yield (
            f"| {row['kind']} | {row['where']} | {row['devices']} | {row['count']} | "
            f"{row['bytes'] / 1e6:,.3f} |"
        )
    if any(one.where == "loop" and one.times == 1 for one in found):
        yield ""
        yield "Loops count as one pass: the program does not say how many there are."


def _time_lines(report: Report) -> Iterator[str]:
    yield (
        f"{report['flops'] / 1e12:.3g} TFLOP and {report['bytes_accessed'] / 1e9:.3g} GB of memory "
        "traffic a device and step, as the compiler counts them."
    )
    bounds = report["bounds"]
    if not bounds:
        why = "the chip's rates are not known"
        if report["accumulate_steps"] > 1:
            why = "the compiler counts the micro-batches' loop once"
        yield f"No estimate of the time: {why}."
        return
    binds = max(bounds, key=bounds.get)
    parts = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in bounds.items())
    rate = report["batch"] / bounds[binds]
    yield (
        f"At the chip's stated rates these take {parts}: {binds} binds, and a step of no less than "
        f"that makes {rate:,.0f} images/s, {rate / report['devices']:,.0f} a device. This is an "
        "estimate, not a measurement."
    )
