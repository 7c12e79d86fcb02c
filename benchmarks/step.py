"""Measures a compiled step: of training, of inference, or of a frozen teacher.

python tools/benchmark.py train --model deit_tiny_distilled_patch16_224 --batch 32 --compare torch
python tools/benchmark.py train --model deit_base_distilled_patch16_224 --batch 256 --distill hard
python tools/benchmark.py infer --model deit_base_patch16_224 --batch 256 --json
python tools/benchmark.py teacher --model regnety_160 --batch 256 --profile traces

--compare torch times timm's model with the same work in PyTorch, eager and with torch.compile, in
turns with ours. docs/benchmarks.md explains the work, the figures, and when to trust them.
"""

import contextlib
import functools
import os
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import jax_step
from benchmarks.turns import Program, Runner, Turn, take_turns
from deit_jax.cli.arguments import new_file, one_or_more
from deit_jax.errors import InputError, brief
from deit_jax.models import registry
from deit_jax.planning.markdown import head, origin, publish, table

RECIPE = ""
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "timm")

Report = dict[str, Any]  # what --json prints


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the flags; the part is `arguments.command`."""
    add, number = parser.add_argument, {"type": one_or_more, "metavar": "N"}
    add("--model", required=True, metavar="NAME", help="see deit_jax.list_models()")
    add("--batch", **number, default=32, help="images a step, of all devices (default: 32)")
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the matmuls")
    add("--distill", choices=["none", "hard"], default="none", help="train: with a teacher")
    add("--teacher", default="regnety_160", metavar="NAME", help="train: of --distill")
    add("--ema", action="store_true", help="train: with the EMA of the weights")
    add("--compare", choices=["torch"], help="also time timm, eager and compiled")
    add("--rounds", **number, default=10, help="turns that count (default: 10)")
    add("--steps", **number, help="steps in a turn (default: 1 on CPU, else 20)")
    add("--profile", metavar="DIR", help="write three steps of ours for TensorBoard or Perfetto")
    add("--write", type=new_file, metavar="FILE", help="also put the report into this file")


def run(arguments: Namespace, emit: Callable[[Report], None]) -> None:
    """Measures and reports.

    Raises:
      InputError: flags that are wrong or do not fit together.
    """
    registry.model_options(arguments.model)  # raises for an unknown name
    training = arguments.command == "train"
    work = jax_step.Work(
        part=arguments.command,
        model=arguments.model,
        batch=arguments.batch,
        dtype=arguments.dtype,
        teacher=arguments.teacher if training and arguments.distill == "hard" else "",
        ema=training and arguments.ema,
    )
    if arguments.compare:  # else JAX takes most of a GPU's memory from PyTorch
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    failed = {}
    with contextlib.ExitStack() as stack:
        build = functools.partial(jax_step.build, work, arguments.profile)
        runners = {"ours": stack.enter_context(Runner("ours", build))}
        facts = runners["ours"].facts
        device = _torch_device(facts) if arguments.compare else None
        for name, compiled in (("torch eager", False), ("torch compile", True)):
            if arguments.compare:
                build = functools.partial(torch_program, work, device, compiled)
                try:
                    runners[name] = stack.enter_context(Runner(name, build))
                except Exception as error:
                    if not compiled:
                        raise
                    failed[name] = {"error": brief(error)}  # there may be no C++ compiler here
        on_cpu = facts["platform"] == "cpu"
        count = arguments.steps or (1 if on_cpu else 20)
        turns = take_turns(runners, rounds=arguments.rounds, count=count)
    rows = {
        name: figures(taken, turns["ours"], count, work.batch, on_cpu)
        for name, taken in turns.items()
    }
    ours = rows.pop("ours")
    achieved, peak = facts["flops"] / (ours["step_ms"] / 1e3), facts["peak_flops"]
    report = {
        **work._asdict(),
        **origin(*PACKAGES),
        "device": facts["device"],
        "rounds": arguments.rounds,
        "steps_per_round": count,
        **ours,
        "mfu": achieved / peak if peak else None,
        "tflops_per_second": achieved / 1e12,
        "compile_s": facts["compile_s"],
        "compare": rows | failed,
    }
    publish(markdown(report, arguments.command_line), arguments.write)
    emit(report)


def torch_program(*arguments: Any) -> Program:
    """Builds PyTorch's program; see `torch_step.build`."""
    from benchmarks import torch_step  # PyTorch: imported by its own processes alone

    return torch_step.build(*arguments)


def _torch_device(facts: dict[str, Any]) -> str:
    """PyTorch's name for the one device that JAX uses."""
    names = {"cpu": "cpu", "gpu": "cuda"}
    if facts["platform"] not in names or facts["devices"] > 1:
        raise InputError(
            f"--compare needs one CPU or GPU, JAX has {facts['device']}; choose one with "
            "CUDA_VISIBLE_DEVICES=0 or JAX_PLATFORMS=cpu"
        )
    return names[facts["platform"]]


def figures(
    turns: list[Turn], ours: list[Turn], count: int, batch: int, on_cpu: bool
) -> dict[str, float | None]:
    """Returns the medians of a program's turns of `count` steps, and of its ratio to ours."""
    clock = "cpu" if on_cpu else "wall"
    wall = statistics.median(turn.wall for turn in turns) / count
    cpu = statistics.median(turn.cpu for turn in turns) / count
    ratios = (getattr(a, clock) / getattr(b, clock) for a, b in zip(ours, turns, strict=True))
    return {
        "images_per_second": batch / wall,
        "step_ms": 1e3 * wall,
        "cpu_ms": 1e3 * cpu if on_cpu else None,
        "peak_memory_bytes": turns[-1].peak_memory,
        "ours_over_theirs": statistics.median(ratios),
    }


def markdown(report: Report, command: str) -> Iterator[str]:
    """Yields the lines of the report's section; the first is its heading."""
    what = {"train": "Training", "infer": "Inference", "teacher": "Teacher"}[report["part"]]
    teacher = f", teacher {report['teacher']}" if report["teacher"] else ""
    title = f"{what} {report['model']}{teacher}, {report['dtype']}, batch {report['batch']}"
    yield from head(title, command, report, report["device"])
    mfu = "" if report["mfu"] is None else f" MFU {report['mfu']:.0%}."
    yield f"Compiled in {report['compile_s']:.0f} s, {report['peak_memory_bytes'] / 1e9:.2f} GB."
    yield f"{report['rounds']} turns of {report['steps_per_round']} step(s).{mfu}"
    yield ""
    rows = []
    for name, row in {"ours": report, **report["compare"]}.items():
        if "error" in row:
            rows.append((name, row["error"], "", "", ""))
            continue
        cpu = "" if row["cpu_ms"] is None else f"{row['cpu_ms']:.0f}"
        ratio = "" if name == "ours" else f"{row['ours_over_theirs']:.2f}"
        rows.append((name, f"{row['images_per_second']:.1f}", f"{row['step_ms']:.1f}", cpu, ratio))
    yield from table("", "images/s", "step, ms", "CPU time, ms", "ratio", rows=rows)
