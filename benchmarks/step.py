"""Measures a compiled step: of training, of inference, or of a frozen teacher.

python tools/benchmark.py train --model deit_tiny_distilled_patch16_224 --batch 32 --compare torch
python tools/benchmark.py train --model deit_base_distilled_patch16_224 --batch 256 --distill hard
python tools/benchmark.py infer --model deit_base_patch16_224 --batch 256 --json
python tools/benchmark.py teacher --model regnety_160 --batch 256 --json

train: the training loop's own step on uint8 images that are on the device already: normalise,
erase, mixup or cutmix, forward with stochastic depth, soft-target cross-entropy, backward, AdamW;
with --distill also the teacher's forward pass and its loss, with --ema the moving average. It also
computes the gradient's norm and leaves a step that is not finite out, as the loop's does.
infer: normalise and forward, from uint8 images to logits. teacher: forward alone.

--compare torch times timm's model with the same work in PyTorch, eager and with torch.compile, each
in a process of its own and all in turns: in float32, or with autocast to bfloat16, by timm's
augmentation and PyTorch's AdamW (fused on a GPU). Its step computes no gradient norm and no
metrics. Every round of turns gives a ratio, ours to theirs: below 1 ours is faster. On CPU what
counts is CPU time, of all cores; elsewhere the clock. Threads that spin while they wait for one
another count too, which on a busy machine doubles PyTorch's time: compare on an idle one, on one
core (`taskset -c 0`), or with OMP_WAIT_POLICY=passive. Neither side reads images.

mfu is the share of the devices' bfloat16 peak that the products and convolutions of the model come
to, three times the forward pass in training (recomputation is not counted); null where the peak is
not known. peak_memory_bytes is the compiler's plan on CPU.
"""

import contextlib
import datetime
import os
import platform
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import Any

import jax

from benchmarks import programs
from benchmarks.programs import Program, Turn, Work
from deit_jax.errors import InputError
from deit_jax.parallel import cpu_memory
from deit_jax.planning import markdown as reports

PARTS = ("train", "infer", "teacher")
USAGE = "%(prog)s train|infer|teacher --model NAME [options]"
WARM_UP = 2  # turns that do not count
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "timm")

Report = dict[str, Any]  # what --json prints


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the flags; the part itself is `arguments.part`."""
    add_work_arguments(parser)
    add = parser.add_argument
    add("--compare", choices=["torch", "torch_eager"], help="also time timm: eager and compiled")
    add("--rounds", type=int, default=10, help="turns that count (default: 10)")
    add("--steps", type=int, help="steps in a turn (default: 1 on CPU, else 20)")


def add_work_arguments(parser: ArgumentParser) -> None:
    """Adds the flags that say what a step does."""
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="see deit_jax.list_models()")
    add("--batch", type=int, default=32, help="images a step, of all devices (default: 32)")
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the products")
    add("--distill", choices=["none", "hard"], default="none", help="train: with a teacher")
    add("--teacher", default="regnety_160", metavar="NAME", help="train: of --distill")
    add("--drop-path", type=float, default=0.1, help="train: stochastic depth (default: 0.1)")
    add("--ema", action="store_true", help="train: with the moving average of the weights")


def work_of(arguments: Namespace) -> Work:
    """What the flags of `add_work_arguments` ask for."""
    training = arguments.part == "train"
    return Work(
        part=arguments.part,
        model=arguments.model,
        batch=arguments.batch,
        dtype=arguments.dtype,
        teacher=arguments.teacher if training and arguments.distill == "hard" else "",
        ema=training and arguments.ema,
        drop_path_rate=arguments.drop_path if training else 0.0,
    )


def run(arguments: Namespace) -> Report:
    """Measures.

    Raises:
      InputError: flags that are wrong or do not fit together, or PyTorch cannot do the work.
    """
    if arguments.compare:
        # Before JAX starts, which else takes most of a GPU's memory from PyTorch.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    cpu_memory.keep_memory()  # as the training loop does
    on_cpu = jax.default_backend() == "cpu"
    count = (1 if on_cpu else 20) if arguments.steps is None else arguments.steps
    for name, value in (("rounds", arguments.rounds), ("steps", count)):
        if value < 1:
            raise InputError(f"--{name} is {value}, expected 1 or more")
    work = work_of(arguments)
    if arguments.compare:
        device = _torch_device()
    ours = programs.build(work)
    with contextlib.ExitStack() as stack:
        theirs, failed = {}, {}
        if arguments.compare:
            from benchmarks import torch_step

            with_compile = arguments.compare == "torch"
            started = torch_step.opponents(work, device, with_compile=with_compile)
            for name, other in started:
                if isinstance(other, InputError):
                    failed[name] = {"error": str(other)}
                    continue
                stack.callback(other.close)
                theirs[name] = other
        turns = _take_turns({"ours": ours, **theirs}, arguments.rounds, count)
        clock = "cpu" if on_cpu else "wall"
        report = _report(work, ours, turns["ours"], on_cpu)
        report |= {"rounds": arguments.rounds, "steps_per_round": count}
        if arguments.compare:
            report["compare"] = failed | {
                name: _figures(work, turns[name], on_cpu)
                | {
                    "first_step_s": other.first_s,
                    "peak_memory_bytes": other.peak_memory(),
                    "ours_over_theirs": _ratio(turns["ours"], turns[name], clock),
                }
                for name, other in theirs.items()
            }
    return report


def _torch_device() -> str:
    """PyTorch's name for the one device that JAX uses."""
    names = {"cpu": "cpu", "gpu": "cuda"}
    platform_name, count = jax.default_backend(), jax.device_count()
    if platform_name not in names or count > 1:
        raise InputError(
            f"--compare needs one CPU or GPU, JAX has {count} device(s) of {platform_name!r}; "
            "choose one with CUDA_VISIBLE_DEVICES=0 or JAX_PLATFORMS=cpu"
        )
    return names[platform_name]


def _take_turns(contestants: dict[str, Any], rounds: int, count: int) -> dict[str, list[Turn]]:
    turns = {name: [] for name in contestants}
    for number in range(-WARM_UP, rounds):
        # To and fro, so that nobody always follows the same other one.
        for name in list(contestants)[:: -1 if number % 2 else 1]:
            turn = contestants[name].turn(count)
            if number >= 0:
                turns[name].append(turn)
    return turns


def _report(work: Work, ours: Program, turns: list[Turn], on_cpu: bool) -> Report:
    figures = _figures(work, turns, on_cpu)
    peak = programs.peak_flops()
    achieved = ours.flops / (figures["step_ms"] / 1e3)
    return {
        **work._asdict(),
        "date": str(datetime.date.today()),
        "device": f"{jax.device_count()} × {_device()}",
        "versions": {"python": platform.python_version(), **reports.versions(*PACKAGES)},
        **figures,
        "mfu": achieved / peak if peak else None,
        "tflops_per_second": achieved / 1e12,
        "compile_s": ours.compile_s,
        "peak_memory_bytes": ours.peak_memory(),
    }


def _figures(work: Work, turns: list[Turn], on_cpu: bool) -> dict[str, float | None]:
    wall = statistics.median(turn.wall for turn in turns)
    return {
        "images_per_second": work.batch / wall,
        "step_ms": 1e3 * wall,
        "cpu_ms": 1e3 * statistics.median(turn.cpu for turn in turns) if on_cpu else None,
    }


def _ratio(ours: list[Turn], theirs: list[Turn], clock: str) -> float:
    pairs = zip(ours, theirs, strict=True)
    return statistics.median(getattr(a, clock) / getattr(b, clock) for a, b in pairs)


def _device() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{reports.processor()}, {cores} cores"


def markdown(report: Report, command: str) -> Iterator[str]:
    """The lines of the report's section; the first is its heading."""
    what = {"train": "Training", "infer": "Inference", "teacher": "Teacher"}[report["part"]]
    taught = f", taught by {report['teacher']}" if report["teacher"] else ""
    yield f"## {what} {report['model']}{taught}, {report['dtype']}, batch {report['batch']}"
    yield ""
    yield f"`{command}`"
    yield ""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    mfu = "" if report["mfu"] is None else f" MFU {report['mfu']:.0%}."
    memory = report["peak_memory_bytes"] / 1e9
    yield f"{report['date']}, {report['device']}; {versions}."
    yield f"Compiled in {report['compile_s']:.0f} s, {memory:.2f} GB.{mfu} Medians of"
    yield f"{report['rounds']} turns of {report['steps_per_round']} step(s); the ratio is ours to"
    yield f"theirs by {'the clock' if report['cpu_ms'] is None else 'CPU time'}."
    yield ""
    yield "| | images/s | step, ms | CPU time, ms | ratio |"
    yield "|---|---|---|---|---|"
    for name, row in {"deit_jax": report, **report.get("compare", {})}.items():
        label = name.replace("_", " ").replace("torch", "timm, torch").replace("deit jax", "ours")
        if "error" in row:
            yield f"| {label} | {row['error']} | | | |"
            continue
        cpu = "" if row["cpu_ms"] is None else f"{row['cpu_ms']:.0f}"
        ratio = f"{row['ours_over_theirs']:.2f}" if "ours_over_theirs" in row else ""
        yield (
            f"| {label} | {row['images_per_second']:.1f} | {row['step_ms']:.1f} | {cpu} | {ratio} |"
        )
