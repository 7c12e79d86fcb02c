"""Writes a forecast as Markdown: memory, collectives, time, and what the input must deliver."""

import math
from collections.abc import Iterator

from deit_jax.parallel.mesh import FSDP
from deit_jax.planning.markdown import table

GIB = 2**30
Report = dict[str, object]  # what `forecast.forecast` returns


def lines(report: Report) -> Iterator[str]:
    """Yields the lines of a report, without a heading."""
    axes = " × ".join(f"{name} {size}" for name, size in report["mesh"].items())
    teacher = f", teacher {report['teacher']}" if report["teacher"] else ""
    ways = [report["dtype"], f"{report['batch']} images", axes, *memory_savers(report)]
    yield f"{report['model']} at {report['image_size']} pixels{teacher}; {', '.join(ways)};"
    yield f"{report['devices']} × {report['device']}. Compiled in {report['compile_s']:.0f} s."
    yield ""
    yield from _memory_lines(report)
    yield ""
    yield _verdict(report)
    yield ""
    if report["memory"] is not None:
        yield from _collective_lines(report["collectives"])
        yield ""
        yield from _time_lines(report)
        yield ""
        if report["estimate"]:
            yield from estimate_lines(report)
            yield ""
    host = report["host"]
    per_step = host["bytes_per_step"] / 1e6
    if host["images_per_second"]:
        rate = f"{host['images_per_second']:,.0f} images/s"
    else:
        rate = f"{report['batch']:,} / S images/s for a step of S seconds"
    yield (
        f"Input: {host['bytes_per_image']:,} bytes per image, {per_step:.1f} MB per step; the "
        f"hosts together must deliver {rate}."
    )


def memory_savers(report: Report) -> Iterator[str]:
    """Yields the recipe's choices that trade time for memory, in words."""
    if report["remat"]:
        yield "remat"
    if report["accumulate_steps"] > 1:
        yield f"{report['accumulate_steps']} micro-batches"


def _memory_lines(report: Report) -> Iterator[str]:
    state, memory = report["state"], report["memory"]
    rows = {"EMA" if name == "ema" else name: size for name, size in state.items() if size}
    if memory is not None:
        rows |= {
            "**arguments**: all of these, as the compiler lays them out": memory["arguments"],
            "**outputs** that take no argument's place": memory["outputs"],
            "**temporaries**: activations, gradients and the like": memory["temporaries"],
            "**program**": memory["program"],
            "**total**": memory["total"],
        }
    if report["limit"]:
        shared = ", its share of the machine's memory" if report["device"] == "cpu" else ""
        rows[f"the device has{shared}"] = report["limit"]
    cells = ((name, f"{size / GIB:.2f}", f"{size:,}") for name, size in rows.items())
    yield from table("memory per device", "GiB", "bytes", rows=cells)


def _verdict(report: Report) -> str:
    if report["fits"] is None:
        return "Whether it fits is unknown: the device does not report how much memory it has."
    if report["fits"]:
        return "**Fits.**"
    refusal = report["refusal"]
    if refusal is None:
        over = report["memory"]["total"] - report["limit"]
    else:
        over = refusal["used"] and refusal["used"] - refusal["available"]
    excess = f": {over / GIB:.2f} GiB over" if over else ""
    said = f" The compiler: {refusal['message']}" if refusal else ""
    return f"**Does not fit{excess}.** Try {' or '.join(_remedies(report))}.{said}"


def _remedies(report: Report) -> Iterator[str]:
    fsdp, devices = report["mesh"][FSDP], report["devices"]
    if fsdp < devices:
        eight = math.gcd(devices, 8)
        yield f"--config.parallel.fsdp={eight if fsdp < eight else devices}"
    if not report["remat"]:
        yield "--config.model.remat=True"
    if report["accumulate_steps"] == 1:
        yield "--config.train.accumulate_steps=2"
    yield "a smaller --config.train.batch_size"


def _collective_lines(rows: list[dict]) -> Iterator[str]:
    if not rows:
        yield "No collectives: the devices exchange nothing."
        return
    columns = ("collective", "where", "devices", "operations per step", "MB per step")
    cells = (
        (row["kind"], row["where"], row["devices"], row["count"], f"{row['bytes'] / 1e6:,.3f}")
        for row in rows
    )
    yield from table(*columns, rows=cells)


def _time_lines(report: Report) -> Iterator[str]:
    by = "its kernels' shapes say" if "rates" in report["estimate"] else "the compiler counts them"
    yield (
        f"{report['flops'] / 1e12:.3g} TFLOP and {report['bytes_accessed'] / 1e9:.3g} GB of memory "
        f"traffic per device and step, as {by}."
    )
    bounds = report["bounds"]
    if not bounds:
        why = "the chip's rates are not known"
        if report["accumulate_steps"] > 1:
            why = "the compiler counts the loop over micro-batches once"
        yield f"No estimate of the time: {why}."
        return
    longest = max(bounds, key=bounds.get)
    parts = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in bounds.items())
    rate = report["batch"] / bounds[longest]
    yield (
        f"At the chip's stated rates: {parts}; {longest}-bound: at most {rate:,.0f} images/s, "
        f"{rate / report['devices']:,.0f} per device. An estimate, not a measurement."
    )


def estimate_lines(report: Report) -> Iterator[str]:
    """Yields what is expected of the step's parts, and what that leaves out."""
    estimate = report["estimate"]
    seconds, rates = estimate["seconds"], estimate.get("rates")
    rate = report["batch"] / report["devices"] / seconds
    used = f", {100 * estimate['mfu']:.1f} % of the chip's FLOP/s" if estimate["mfu"] else ""
    how = "the cycles that the compiler expects of each operation"
    if rates:
        how = (
            f"kernel, the longer of its bytes at {rates['bandwidth'] / 1e12:g} TB/s and its "
            f"products at {rates['products'] / 1e12:g} TFLOP/s"
        )
    yield (
        f"By {how}: {1e3 * seconds:.1f} ms, {rate:,.0f} images/s per device{used}. They rank "
        "programs; nothing was measured."
    )
    yield ""
    whole = sum(row["forward"] + row["backward"] for row in estimate["parts"])

    def milliseconds(number: float) -> str:
        return f"{1e3 * seconds * number / whole:.2f}"

    def work(row: dict) -> tuple:
        return row["kernels"], f"{row['bytes'] / 1e9:.2f}", f"{row['flops'] / 1e12:.3f}"

    rows = [
        (
            row["part"],
            *(work(row) if rates else ()),
            milliseconds(row["forward"]),
            milliseconds(row["backward"]),
            f"{100 * (row['forward'] + row['backward']) / whole:.0f} %",
        )
        for row in estimate["parts"]
    ]
    columns = ("kernels", "GB", "TFLOP") if rates else ()
    yield from table("part", *columns, "forward ms", "backward ms", "share", rows=rows)
    yield ""
    left = [
        f"{row['count']} × {row['kind']} ({row['bytes'] / 1e6:,.0f} MB)"
        for row in estimate["uncounted"]
    ]
    if rates:
        left = [f"the products of {one}" for one in left]
        if report["collectives"]:
            left.append("the collectives above")
    if estimate["loops"]:
        left.append(f"all but the first round of {estimate['loops']} loops of unknown length")
    yield f"Not in these {'times' if rates else 'cycles'}: {'; '.join(left) or 'nothing'}."
