"""Measures the training step on one GPU beside timm's, each switch of it, attention, and parity.

python tools/benchmark.py device --minutes 12 --out device.jsonl --write docs/gpu.md
python tools/benchmark.py device --only "tiny*" --only "small*"
python tools/benchmark.py device --tiny --batch 4

The most important comes first. Every finished row is at once a line of JSON on stdout and in --out,
to which a later run appends. What does not fit the time is named, and what fails has its reason.
--tiny tries all of it with tiny models on any device. docs/benchmarks.md explains the figures.
"""

import contextlib
import fnmatch
import json
import os
import signal
import sys
import tempfile
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from deit_jax import storage
from deit_jax.cli import startup
from deit_jax.cli.arguments import new_file, one_or_more
from deit_jax.console import log
from deit_jax.errors import InputError, brief
from deit_jax.planning.markdown import head, origin, publish, table

RECIPE = ""
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "triton", "timm")
NEEDED = {"ml_collections": "ml-collections", "flax": "flax", "optax": "optax",
          "orbax": "orbax-checkpoint"}  # fmt: skip
_END_S = 10  # of the time, to end processes and to print

Row = dict[str, Any]


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the flags."""
    add = parser.add_argument
    add("--minutes", type=_minutes, default=12.0, metavar="M", help="at most (default: 12)")
    add("--batch", type=one_or_more, default=256, metavar="N", help="images a step (default: 256)")
    add("--only", action="append", metavar="GROUP", help="of this name or pattern; again for more")
    add("--tiny", action="store_true", help="tiny models, without torch.compile, on any device")
    add("--out", type=_file_of_lines, default="device.jsonl", metavar="FILE", help="(device.jsonl)")
    add("--write", type=new_file, metavar="FILE", help="also put the tables into a Markdown file")


def _minutes(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0.5 <= float(text) <= 600:
            return float(text)
    raise ArgumentTypeError(f"{text} is not a number from 0.5 to 600")


def _file_of_lines(text: str) -> storage.Path:
    if storage.is_remote(file := new_file(text)):
        raise ArgumentTypeError(f"{text} is in a bucket, where no line can be added to a file")
    return file


def run(arguments: Namespace, emit: Callable[[object], None]) -> None:
    """Measures what fits the time, and reports.

    Raises:
      InputError: no GPU, several, a package that is missing, or no such group.
    """
    begin = time.monotonic()
    check_packages()
    startup.quieten_absent_tpu()
    # Only now: they need what was just found.
    from benchmarks import device_group, device_plan, device_programs
    from benchmarks.turns import Runner

    if arguments.tiny and arguments.batch % 2:
        raise InputError(f"--batch is {arguments.batch}, expected an even number")
    groups = choose(device_plan.groups(arguments.batch, tiny=arguments.tiny), arguments.only)
    budget = device_plan.Budget(60 * arguments.minutes - _END_S)
    try:
        with Runner("device", device_programs.probe, deadline=budget.deadline) as probe:
            facts = probe.facts
    except RuntimeError as error:
        raise InputError(f"JAX finds no device here: {brief(error)}") from error
    check_device(facts, tiny=arguments.tiny)
    report = origin(*PACKAGES) | {"command": arguments.command_line, "device": facts["device"]}
    report |= {"batch": arguments.batch, "only": arguments.only or []}
    rows, not_reached = [], [group.name for group in groups]
    with _ended_by_sigterm(), contextlib.ExitStack() as stack:
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        few = {"rounds": 2, "turn_s": 0.1} if arguments.tiny else {}
        place = device_plan.Place(facts["platform"], cache, **few)
        file = stack.enter_context(open(arguments.out, "a", encoding="utf-8"))

        def write(row: Row) -> None:
            line = json.dumps(row)
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
            log(line)

        write(report | {"kind": "run"})
        try:
            for group in groups:
                for row in device_group.measure(group, budget, place):
                    rows.append(row | {"at_s": time.monotonic() - begin})
                    write(rows[-1])
                not_reached.remove(group.name)
        finally:  # also what was measured until Ctrl-C
            device_group.kill_all()
            report |= {"rows": rows, "not_reached": not_reached}
            report["minutes"] = (time.monotonic() - begin) / 60
            publish(markdown(report), arguments.write)
    emit(report)


def check_packages() -> None:
    """Raises InputError where a package that our own step needs is missing."""
    missing = [package for name, package in NEEDED.items() if find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        raise InputError(
            f"{', '.join(missing)} missing: pip install {names}; for a machine without a network, "
            f"pip install --target FOLDER --no-deps {names} elsewhere, and set PYTHONPATH=FOLDER"
        )


def check_device(facts: Row, *, tiny: bool) -> None:
    """Raises InputError unless JAX has one GPU; a CPU will do for tiny models."""
    if facts["count"] > 1:
        raise InputError(f"JAX has {facts['count']} devices; choose one: CUDA_VISIBLE_DEVICES=0")
    allowed = ("gpu", "cpu") if tiny else ("gpu",)
    if facts["platform"] not in allowed:
        raise InputError(
            f"JAX has no GPU here, but {facts['device']} ({facts['platform']}); install JAX with "
            "CUDA (pip install 'jax[cuda13]'), or try --tiny --batch 4"
        )


def choose(groups: list, patterns: list[str] | None) -> list:
    """Returns the groups that match any pattern, in their order; all without patterns."""
    if not patterns:
        return groups
    for pattern in patterns:
        if not any(fnmatch.fnmatch(group.name, pattern) for group in groups):
            names = ", ".join(repr(group.name) for group in groups)
            raise InputError(f"--only is {pattern!r}, which is none of the groups {names}")
    return [one for one in groups if any(fnmatch.fnmatch(one.name, p) for p in patterns)]


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Lets SIGTERM, which `timeout` sends, end the program as Ctrl-C does: with its tables."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt("ended by SIGTERM")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def markdown(report: Row) -> Iterator[str]:
    """Yields the lines of the report's section; the first is its heading."""
    rows = report["rows"]
    title = [f"Measured on one {report['device']}, batch {report['batch']}", *report["only"]]
    yield from head(", ".join(title), report["command"], report)
    yield f"{report['minutes']:.1f} minutes. Ratio: the step of ours to that of the row."
    measured = [row for row in rows if "error" not in row and "skipped" not in row]
    for kind, columns in _COLUMNS.items():
        found = [row for row in measured if row["kind"] == kind]
        if found:
            cells = ([show(row) for show in columns.values()] for row in found)
            yield from ("", *table(*columns, rows=cells))
    for words, key in (("Failed", "error"), ("Not measured", "skipped")):
        named = [f"- {row['group']}: {row['program']}: {row[key]}" for row in rows if key in row]
        if named:
            yield from ("", f"{words}:", "", *named)
    if report["not_reached"]:
        yield from ("", f"Ended before, or within: {', '.join(report['not_reached'])}.")


def _number(name: str, form: str, scale: float = 1.0) -> Callable[[Row], str]:
    return lambda row: "" if row[name] is None else format(row[name] * scale, form)


_COLUMNS = {
    "step": {
        "model": lambda row: row["model"],
        "teacher": lambda row: row["teacher"],
        "program": lambda row: row["program"],
        "images/s": _number("images_per_second", ",.0f"),
        "step, ms": _number("step_ms", ".2f"),
        "MFU": _number("mfu", ".1%"),
        "peak, GB": _number("peak_memory_bytes", ".2f", 1e-9),
        "ratio": _number("ours_over_theirs", ".2f"),
        "ready after, s": _number("built_s", ".0f"),
    },
    "attention": {
        "attention": lambda row: row["program"],
        "tokens": lambda row: row["tokens"],
        "forward, ms": _number("forward_ms", ".3f"),
        "forward and backward, ms": _number("both_ms", ".3f"),
        "TFLOP/s": _number("tflops_per_second", ".0f"),
        "error of output": _number("output_error", ".4f"),
        "error of gradient": _number("gradient_error", ".4f"),
    },
    "parity": {
        "a step of the device in": lambda row: row["program"],
        "loss": _number("loss", ".6f"),
        "loss on CPU": lambda row: f"{row['loss_cpu']:.6f}",
        "gradient from that of CPU in float32": _number("difference", ".1e"),
        "limit": _number("limit", ".1e"),
        "holds": lambda row: "yes" if row["holds"] else "**no**",
    },
}


if __name__ == "__main__":
    from benchmarks import benchmark

    sys.exit(benchmark.main(["device", *sys.argv[1:]]))
