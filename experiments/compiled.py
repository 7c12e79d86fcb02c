"""Compiles training steps for chips that are not here; writes the tables of docs/tpu.md and gpu.md.

python -m experiments.compiled tpu
python -m experiments.compiled gpu
python -m experiments.compiled attention

A row is the report of one `deit-jax compile-for --json`, which takes minutes. Rows are kept in
docs/results/compiled_KIND.jsonl, and are not compiled again: delete a line there to renew it. The
tables of steps stand between `<!-- compiled -->` and `<!-- end of compiled -->`, that of attention
on TPUs, with and without the kernels, between `<!-- attention -->` and its end in docs/tpu.md.
"""

import json
import math
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from deit_jax.cli.arguments import Parser
from deit_jax.cli.status import exit_status
from deit_jax.console import log
from deit_jax.errors import InputError
from deit_jax.planning.markdown import table, write_between

_DOCS = Path("docs")
_REMAT = "--config.model.remat=True"
_CUDNN = "--config.model.attention=cudnn"
_HALVES = "--config.train.accumulate_steps=2"
_SIZES = ("deit:ti", "deit:s", "deit_b")
_BLOCKS = 2  # of the models that show attention alone
_WAYS = ("xla", "pallas")
_COLUMNS = {
    "attention": "attention",
    "MLP": "MLP",
    "norms": "norms",
    "teacher": "teacher",
    "optimiser": "optimiser, EMA, guard",
    "data": "moving data",
}


def _cells(kind: str) -> Iterator[tuple[str, str, int, str]]:
    """Yields (topology, recipe, images a chip, further flags) of every row."""
    images = (64, 128, 256)
    if kind == "tpu":
        yield from (("v5e:2x2", size, count, "") for size in reversed(_SIZES) for count in images)
        yield "v5e:2x2", "deit:s", 128, _HALVES
        yield "v5e:2x2", "deit_b_distill", 64, ""
        for slice_ in ("v6e:2x2", "v5p:2x2x1"):
            yield from ((slice_, "deit_b", count, "") for count in (64, 128))
            yield slice_, "deit_b_distill", 64, ""
        yield "v5e:2x2", "deit3:l", 64, ""
        yield "v5e:4x8", "deit3:h", 64, _REMAT
        yield "v5e:4x8", "deit3:h", 64, f"--config.parallel.fsdp=8 {_REMAT}"
    elif kind == "attention":
        sizes = [
            (recipe, *each) for recipe in (*_SIZES, "deit3:l") for each in ((224, 64), (384, 16))
        ]
        for recipe, pixels, count in (*sizes, ("deit:s", 128, 64), ("deit_b", 448, 16)):
            for way in _WAYS:
                flags = f"--config.input.image_size={pixels} --config.model.options=depth={_BLOCKS}"
                yield "v5e:2x2", recipe, count, f"{flags} --config.model.attention={way}"
    else:
        for how in ("", _CUDNN):
            yield "cuda:H200x1", "deit_b", 256, how
            yield "cuda:H200x8", "deit_b_distill", 256, how
        yield from (("cuda:H200x1", "deit_b", count, _CUDNN) for count in (64, 128))
        yield from (("cuda:H200x1", size, 256, _CUDNN) for size in ("deit:s", "deit:ti"))
        yield from (("cuda:H200x8", f"deit3:{size}", 64, _CUDNN) for size in "lh")
        yield "cuda:H100x1", "deit_b", 256, _CUDNN


def _command(topology: str, recipe: str, images: int, flags: str) -> str:
    kind, _, shape = topology.partition(":")
    counts = shape.split("x")[kind == "cuda" :]  # of which the first is then the GPU's name
    devices = math.prod(map(int, counts))
    batch = f"--config.train.batch_size={images * devices}"
    words = "deit-jax compile-for", f"--config={recipe} --topology {topology}", batch, flags
    return " ".join(filter(None, words))


def _compiled(command: str) -> dict[str, object]:
    """Returns what a table needs of the report."""
    flags = shlex.split(command)[1:]
    done = subprocess.run(
        [sys.executable, "-m", "deit_jax", *flags, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise InputError(f"`{command}` ended with status {done.returncode}")
    report = json.loads(done.stdout)
    names = "model", "image_size", "topology", "devices", "batch", "remat", "mesh", "fits"
    row = {"command": command} | {name: report[name] for name in (*names, "date", "versions")}
    row["memory"] = report["memory"] and report["memory"]["total"]
    row["collectives"] = report["collectives"]
    estimate = report["estimate"]
    if estimate:
        row |= {name: estimate[name] for name in ("seconds", "mfu")}
        whole = sum(part["forward"] + part["backward"] for part in estimate["parts"])
        row["parts"] = {
            part["part"]: (part["forward"] + part["backward"]) / whole for part in estimate["parts"]
        }
    return row


def _kept(file: Path) -> dict[str, dict[str, object]]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {row["command"]: row for row in map(json.loads, lines)}


def lines(rows: list[dict[str, object]]) -> Iterator[str]:
    """Yields the table: what is estimated of each step, and of its parts in milliseconds."""
    cells = []
    for row in rows:
        batch = row["batch"] // row["devices"]
        how = [f"fsdp {row['mesh']['fsdp']}"] * (row["mesh"]["fsdp"] > 1) + ["remat"] * row["remat"]
        how += ["cuDNN"] * (_CUDNN in row["command"])
        how += ["in two micro-batches"] * (_HALVES in row["command"])
        name = ", ".join([row["model"].removesuffix("_224"), *how])
        first = name, row["topology"], batch
        if "seconds" not in row:
            cells.append((*first, "does not fit", *[""] * (3 + len(_COLUMNS))))
            continue
        parts = [row["seconds"] * row["parts"].get(part, 0.0) for part in _COLUMNS.values()]
        speed = (
            f"{1e3 * row['seconds']:.1f}",
            f"{100 * row['mfu']:.1f} %" if row["mfu"] else "",
            f"{batch / row['seconds']:,.0f}",
            f"{row['memory'] / 2**30:.1f}",
        )
        cells.append((*first, *speed, *(f"{1e3 * part:.1f}" if part else "" for part in parts)))
    columns = "model", "chips", "images a chip", "ms", "MFU", "images/s a chip", "GiB a chip"
    yield from table(*columns, *_COLUMNS, rows=cells)
    yield from _origins(rows)


def attention_lines(rows: list[dict[str, object]]) -> Iterator[str]:
    """Yields the table: what attention takes of a block in each way, forward and backward."""
    cells: dict[tuple[object, ...], dict[str, float]] = {}
    for row in rows:
        way = next(way for way in _WAYS if row["command"].endswith(f"={way}"))
        images = row["batch"] // row["devices"]
        each = 1e6 * row["seconds"] * row["parts"]["attention"] / (_BLOCKS * images)
        name = row["model"].removesuffix("_224")
        cells.setdefault((name, row["image_size"], images), {})[way] = each
    columns = "model", "pixels", "images a chip", *_WAYS, f"{_WAYS[0]} / {_WAYS[1]}"
    done = {
        key: tuple(by_way[way] for way in _WAYS)
        for key, by_way in cells.items()
        if len(by_way) == 2
    }
    shown = ((*key, f"{a:.1f}", f"{b:.1f}", f"{a / b:.2f}") for key, (a, b) in done.items())
    yield from table(*columns, rows=shown)
    yield from _origins(rows)


def _origins(rows: list[dict[str, object]]) -> Iterator[str]:
    yield ""
    origins = {(row["date"], *row["versions"].items()) for row in rows}
    for date, *versions in sorted(origins):
        yield f"{date}; {', '.join(f'{name} {number}' for name, number in versions)}."


def _run(argv: list[str]) -> int:
    """Compiles what is missing, row by row, and writes the table after each."""
    parser = Parser(__doc__)
    parser.add_argument("kind", choices=_SECTIONS)
    kind = parser.parse_args(argv).kind
    kept = _DOCS / "results" / f"compiled_{kind}.jsonl"
    page, section, made = _SECTIONS[kind]
    wanted = [_command(*cell) for cell in _cells(kind)]
    for number, command in enumerate(wanted, 1):
        rows = _kept(kept)
        if command not in rows:
            log(f"{number} of {len(wanted)}: {command}")
            rows[command] = _compiled(command)
            kept.parent.mkdir(exist_ok=True)
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[command]) + "\n")
        shown = made([rows[each] for each in wanted if each in rows])
        write_between(_DOCS / page, section, shown)
    return 0


# Of each kind: its page, the name of its section there, and what makes that of the rows.
_SECTIONS = {
    "tpu": ("tpu.md", "compiled", lines),
    "gpu": ("gpu.md", "compiled", lines),
    "attention": ("tpu.md", "attention", attention_lines),
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return exit_status(lambda: _run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
