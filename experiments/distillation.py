"""Compares students with and without a teacher on parts of CIFAR-10, over several seeds.

python -m experiments.distillation --data=cifar10 --workdir=runs/distillation --out=docs
python -m experiments.distillation --out=docs
python -m experiments.distillation --quick --data=cifar10 --workdir=runs/quick --out=runs/quick

The first trains what distillation.toml lists and is not there yet; the second only writes table and
figure of the results in OUT/results. DATA holds train/ and val/ with a folder for each class. A
seed draws the images of its part (of each class the same number), the weights and the order; its
teacher and its students share them. Training never sees val: it is evaluated on 2 % of train, which
are in no part. --held_out ends with that, to tune by; otherwise each finished model predicts all of
val, once. --quick takes distillation_quick.toml: minutes on two cores. Needs matplotlib
(pip install 'deit-jax[plot]').
"""

import json
import math
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

import deit_jax
from deit_jax import storage
from deit_jax.cli import figures
from deit_jax.cli.arguments import Parser
from deit_jax.cli.status import exit_status
from deit_jax.config.files import load_config
from deit_jax.console import log, log_error
from deit_jax.errors import InputError
from deit_jax.inference.predict import predict
from deit_jax.planning.markdown import around, origin, processor, table, write_between
from deit_jax.training import loop
from experiments import cells

TABLES = Path(__file__).parent
HELD_OUT = 0.02  # of each class of train: evaluated while settings are tuned, never trained on
SETTINGS = {"teacher": "teacher", "over": "plain"}  # of a run, beside its fields; and its recipe
DRAWN = ("teacher", "plain", "soft", "hard")  # in the figure; the table has all runs
TOP1 = {"top1": "mean", "top1_cls": "class", "top1_dist": "distillation"}  # report → predictions

Cell = dict[str, Any]  # run, images, seed and fields, and what was found


def read_table(name: str) -> list[dict]:
    """Returns the parts of a table: fraction, seeds, runs, and fields of all and of each run.

    A run may also name a `recipe` of cifar10 other than itself, the run that is its `teacher`,
    and the one `over` which its gain is counted.
    """
    return tomllib.loads((TABLES / f"{name}.toml").read_text(encoding="utf-8"))["part"]


def link_images(data: Path, folder: Path, fraction: float, seed: int) -> Path:
    """Makes `folder` a data set of links: a part of DATA's train images, and those held out.

    The held-out images are the last of each class by name, the same for all seeds. The parts of a
    seed are nested: a smaller one is in each larger one.

    Returns:
      The folder.

    Raises:
      InputError: DATA has no train/ and val/ with folders of images, or `folder` has other images.
    """
    classes = sorted(path for path in (data / "train").glob("*") if path.is_dir())
    if not classes or not (data / "val").is_dir():
        raise InputError(f"--data={data} holds no train/CLASS and val/; unpack CIFAR-10 there")
    for number, path in enumerate(classes):
        files = sorted(path.iterdir())
        rest, held_out = np.split(np.array(files), [round(len(files) * (1 - HELD_OUT))])
        count = min(len(rest), max(1, round(fraction * len(files))))
        order = np.random.RandomState([seed, number]).permutation(len(rest))
        for split, chosen in (("train", rest[order[:count]]), ("val", held_out)):
            (into := folder / split / path.name).mkdir(parents=True, exist_ok=True)
            there = {link.name for link in into.iterdir()}
            wanted = {file.name: file.absolute() for file in chosen}
            if others := there - wanted.keys():
                raise InputError(
                    f"{into} holds {min(others)}, which is not of this part; remove it"
                )
            for name in wanted.keys() - there:
                (into / name).symlink_to(wanted[name])
    return folder


def recipe(part: dict, run: str, seed: int, workdir: Path) -> ConfigDict:
    """Returns the recipe of a cell: cifar10's, with the table's fields for all and for this run."""
    config = load_config(f"cifar10:{part.get(run, {}).get('recipe', run)}")
    config.dataset.root, config.train.seed = str(workdir.absolute() / "images"), seed
    if config.distill.kind != "none":
        config.distill.teacher = str(workdir.absolute() / _settings(part, run)["teacher"])
    config.update_from_flattened_dict(_fields(part, run))
    return config


def _settings(part: dict, run: str) -> dict[str, str]:
    return {name: part.get(run, {}).get(name, usual) for name, usual in SETTINGS.items()}


def _fields(part: dict, run: str) -> dict[str, object]:
    fields = part.get("fields", {}) | part.get(run, {})
    return {name: value for name, value in fields.items() if name not in (*SETTINGS, "recipe")}


def measure(config: ConfigDict, workdir: Path) -> Cell:
    """Trains a cell; returns its top-1 on the held-out images, and where and when that was."""
    top1 = loop.train(config, str(workdir))["top1"]
    command = ["git", "-C", str(TABLES), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    found = {"held_out": top1} | origin("jax", "flax", "tensorflow")
    return found | {"machine": processor(), "commit": commit}


def score(config: ConfigDict, workdir: Path, test: list[Path]) -> dict[str, float]:
    """Returns a cell's figures on the test images, in percent.

    Args:
      config: of the run.
      workdir: of the run; keeps predictions.json, for each head the class of each image.
      test: images, in folders of their classes.

    Returns:
      `top1`; with two heads `top1_cls` and `top1_dist`, each alone; with a teacher `agreement`, on
      how many images it decides as the student does.
    """
    predictions = _predictions(workdir, test)
    names = sorted({file.parent.name for file in test})
    labels = np.array([names.index(file.parent.name) for file in test])
    found = {
        name: 100 * float(np.mean(np.array(predictions[head]) == labels))
        for name, head in TOP1.items()
        if head in predictions
    }
    if config.distill.kind != "none":
        taught = np.array(_predictions(Path(config.distill.teacher), test)["mean"])
        found["agreement"] = 100 * float(np.mean(taught == np.array(predictions["mean"])))
    return found


def _predictions(workdir: Path, files: list[Path]) -> dict[str, list[int]]:
    kept = workdir / "predictions.json"
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    found: dict[str, list[int]] = {}
    model = deit_jax.load_model(str(workdir / "model"))
    for result in predict(model, files, topk=1, batch_size=250):
        if isinstance(result, InputError):
            raise result
        for head, best in ({"mean": result["predictions"]} | result.get("heads", {})).items():
            found.setdefault(head, []).append(best[0]["index"])
    storage.replace_text(kept, json.dumps(found) + "\n")
    return found


def train(
    parts: list[dict], data: Path, workdir: Path, *, held_out: bool, kept: list[Cell]
) -> Iterator[Cell]:
    """Yields the cells of a table that are not kept, seed by seed; trains those not in `workdir`.

    The teacher of a seed is there wherever one of its students is made.

    Raises:
      InputError: before any training, if kept cells of the same images and run have other fields,
        or a run names a teacher that does not come before it, or a run that is not of its part.
    """
    test = [] if held_out else sorted((data / "val").glob("*/*"))
    done, groups = {_key(cell) for cell in kept}, []
    for part in parts:
        for seed in part["seeds"]:
            folder = workdir / f"fraction{part['fraction']:g}" / f"seed{seed}"
            images = link_images(data, folder / "images", part["fraction"], seed)
            count = sum(1 for _ in (images / "train").glob("*/*"))
            cells_here = [
                {"run": run, "images": count, "seed": seed, "fields": _fields(part, run)}
                | {"over": _settings(part, run)["over"]}
                for run in ("teacher", *part["runs"])
            ]
            for cell in cells_here:
                _check_fields(cell, kept)
                _check_names(part, cell["run"])
            groups.append((part, folder, cells_here))
    for part, folder, cells_here in groups:
        missing = {cell["run"] for cell in cells_here if held_out or _key(cell) not in done}
        taught = [run for run in missing if recipe(part, run, 0, folder).distill.kind != "none"]
        wanted = missing | {_settings(part, run)["teacher"] for run in taught}
        for cell in (cell for cell in cells_here if cell["run"] in wanted):
            at = folder / cell["run"]
            config = recipe(part, cell["run"], cell["seed"], folder)
            cell |= cells.report(config, at, lambda c=config, w=at: measure(c, w))
            yield cell | (score(config, at, test) if test else {})


def _key(cell: Cell) -> tuple[int, str, int]:
    return cell["images"], cell["run"], cell["seed"]


def _check_fields(cell: Cell, kept: list[Cell]) -> None:
    for other in kept:
        if _key(other)[:2] == _key(cell)[:2] and other["fields"] != cell["fields"]:
            raise InputError(
                f"the results hold {cell['run']} on {cell['images']} images with the fields "
                f"{other['fields']}, not {cell['fields']}; move them away, or change the table"
            )


def _check_names(part: dict, run: str) -> None:
    runs, named = ["teacher", *part["runs"]], _settings(part, run)
    before = runs[: runs.index(run)]
    if run != "teacher" and named["teacher"] not in before:
        raise InputError(f"{run}: its teacher, {named['teacher']}, is not among {before}")
    if "over" in part.get(run, {}) and named["over"] not in runs:
        raise InputError(f"{run}: {named['over']}, which it is over, is not among {runs}")


def compare(found: list[Cell]) -> Iterator[dict[str, Any]]:
    """Yields a row for each number of images and run: means, and the difference from plain.

    `over` holds the mean and standard error of the difference from the run of the same seed over
    which the table counts it, most often the plain student; it saw the same images.
    """
    groups: dict[tuple[int, str], dict[int, Cell]] = {}
    for cell in found:
        groups.setdefault((cell["images"], cell["run"]), {})[cell["seed"]] = cell
    for (images, run), by_seed in sorted(groups.items(), key=lambda item: item[0][0]):
        base = next(iter(by_seed.values())).get("over", "plain")
        plain = groups.get((images, base), {}) if run not in ("teacher", base) else {}
        over = [c["top1"] - plain[s]["top1"] for s, c in by_seed.items() if s in plain]
        names = (*TOP1, "agreement")
        values = {n: [c[n] for c in by_seed.values() if n in c] for n in names}
        yield {
            "images": images,
            "run": run,
            "seeds": len(by_seed),
            "top1": values.pop("top1"),
            "over": _mean(over) if over else None,
            "base": base,
        } | {name: statistics.mean(each) for name, each in values.items() if each}


def lines(found: list[Cell]) -> Iterator[str]:
    """Yields the table in Markdown."""
    rows = []
    for row in compare(found):
        rest = [f"{row[n]:.1f}" if n in row else "" for n in ("top1_cls", "top1_dist", "agreement")]
        over = row["over"]
        rest += [_with_error(*over), _in_errors(*over)] if over else ["", ""]
        if over and row["base"] != "plain":
            rest[-2] += f" (over {row['base']})"
        rest = [_with_error(*_mean(row["top1"])), *rest]
        rows.append((row["images"], row["run"], row["seeds"], *rest))
    columns = ("images", "run", "seeds", "top-1", "class head", "distillation head")
    columns += ("agrees with teacher", "over plain", "in standard errors")
    yield from table(*columns, rows=rows)


def _mean(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error, NaN of one value."""
    count = len(values)
    error = statistics.stdev(values) / math.sqrt(count) if count > 1 else math.nan
    return statistics.mean(values), error


def _with_error(mean: float, error: float) -> str:
    return f"{mean:.2f}" if math.isnan(error) else f"{mean:.2f} ± {error:.2f}"


def _in_errors(mean: float, error: float) -> str:
    return f"{mean / error:+.1f}" if error > 0 else ""


def draw(found: list[Cell], out: Path) -> None:
    """Draws the mean of each run in DRAWN with its standard error, and the point of each seed."""
    rows = list(compare([cell for cell in found if cell["run"] in DRAWN]))
    runs = [run for run in DRAWN if any(row["run"] == run for row in rows)]
    with figures.new_figure(out, 6, 4) as figure:
        axes = figure.subplots()
        for place, (run, colour) in enumerate(zip(runs, figures.COLOURS, strict=False)):
            mine = [row for row in rows if row["run"] == run]
            at = [row["images"] * 1.03 ** (place - (len(runs) - 1) / 2) for row in mine]
            means, errors = zip(*(_mean(row["top1"]) for row in mine), strict=True)
            how = {"marker": "o", "markersize": 5, "capsize": 3, "color": colour}
            axes.errorbar(at, means, np.nan_to_num(errors), label=run, **how)
            for x, row in zip(at, mine, strict=True):
                each = row["top1"]
                axes.plot([x] * len(each), each, "x", markersize=4, alpha=0.5, color=colour)
        counts = sorted({row["images"] for row in rows})
        axes.set(xscale="log", xlabel="training images", ylabel="top-1 on the test images, %")
        axes.set_xticks(counts, [f"{count:,}" for count in counts], minor=False)
        axes.set_xticks([], minor=True)
        axes.legend()


def write(found: list[Cell], out: Path, name: str) -> None:
    """Writes table and figure of results into OUT, the table into OUT/experiments.md."""
    page, figure = out / "experiments.md", out / "results" / f"{name}.svg"
    if not page.exists():
        page.write_text(f"# Experiments\n\n<!-- {name} -->\n<!-- end of {name} -->\n")
    draw(found, figure)
    where = ", ".join(sorted({f"{cell['date']} ({cell['machine']})" for cell in found}))
    commits = ", ".join(sorted({f"`{cell['commit']}`" for cell in found}))
    legend = f"![Top-1 by the number of training images](results/{figure.name})"
    section = [f"Trained {where}, at commit {commits}.", "", *lines(found), "", legend]
    write_between(page, name, section)
    log("\n".join(section))


def main(argv: list[str] | None = None) -> int:
    """Trains what is missing, writes table and figure; returns the exit status."""
    return exit_status(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path)
    add("--workdir", type=Path)
    add("--out", type=Path, required=True, help="folder of experiments.md and results/")
    add("--quick", action="store_true")
    add("--held_out", action="store_true", help="stop before the test images; writes nothing")
    arguments = parser.parse_args(argv)
    if (arguments.data is None) != (arguments.workdir is None):
        raise InputError("--data and --workdir go together: the images, and where runs are kept")
    name = "distillation_quick" if arguments.quick else "distillation"
    results = arguments.out / "results" / f"{name}.json"
    results.parent.mkdir(parents=True, exist_ok=True)
    figures.check(results.with_suffix(".svg"))
    if (page := arguments.out / "experiments.md").exists() and not arguments.held_out:
        around(page, name)  # which says what is wrong before hours of training
    if arguments.data is not None:
        parts, where = read_table(name), (arguments.data, arguments.workdir)
        for cell in train(parts, *where, held_out=arguments.held_out, kept=_kept(results)):
            log_error(f"{cell['images']} images, seed {cell['seed']}, {cell['run']}: {cell}")
            if not arguments.held_out:
                _keep(cell, results)
    if not arguments.held_out:
        if not (found := _kept(results)):
            raise InputError(f"{results} is not there; --data and --workdir make it")
        write(found, arguments.out, name)


def _keep(cell: Cell, results: Path) -> None:
    """Puts a cell in its place in the results, or after them; a line each."""
    found = {_key(kept): kept for kept in _kept(results)} | {_key(cell): cell}
    rows = ",\n".join(json.dumps(each, ensure_ascii=False) for each in found.values())
    storage.replace_text(results, f"[\n{rows}\n]\n")


def _kept(results: Path) -> list[Cell]:
    return json.loads(results.read_text(encoding="utf-8")) if results.exists() else []


if __name__ == "__main__":
    sys.exit(main())
