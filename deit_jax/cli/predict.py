"""Names what is in pictures, with any model folder.

deit-jax predict --model runs/mine/model cat.jpg dog.png     # the five likeliest classes
deit-jax predict --model runs/mine/model photos > found.csv  # a folder, with all below it
deit-jax predict --model runs/mine/model photos --csv found.csv --topk 1 --batch_size 64
deit-jax predict --model runs/mine/model photos --json       # a JSON object a line

A distilled model predicts with the mean of its two heads' logits; what each head alone says stands
beside it. Text shows percent, CSV and JSON hold probabilities from 0 to 1. Control characters in
names are escaped on stdout; --csv and --json have the names themselves. A picture that cannot be
read is named on stderr and left out, and the exit status is then 1.
"""

import contextlib
import csv
import io
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from deit_jax import pictures, storage
from deit_jax.cli.arguments import check_no_input, new_file, one_or_more
from deit_jax.console import escaped, log_error
from deit_jax.errors import InputError
from deit_jax.folders import describe, printable, walk

RECIPE = ""
FEW = 4  # so many pictures need no progress bar


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the flags."""
    add = parser.add_argument
    add("--model", required=True, help="model or run folder, PyTorch file, URL or hf:OWNER/NAME")
    add("images", nargs="+", metavar="IMAGE", help="image file, or folder searched with all below")
    add("--topk", type=one_or_more, default=5, help="classes to name, at most all (default: 5)")
    add("--batch_size", type=one_or_more, default=16, help="pictures at once (default: 16)")
    add("--csv", type=new_file, metavar="FILE", help="write a CSV, complete or not at all")


def run(arguments: Namespace, emit: Callable[[object], None]) -> int:
    """Predicts and reports; returns 1 where some pictures could not be read, else 0."""
    files = find_images(arguments.images)
    _check_csv(arguments.csv, [*files, arguments.model])
    from deit_jax.convert.load import load_model
    from deit_jax.inference.predict import predict

    model = load_model(arguments.model)
    topk = min(arguments.topk, model.info.num_classes)
    folder = any(map(os.path.isdir, arguments.images))
    heading, status = True, 0
    with (
        _whole(arguments.csv) as part,
        part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
        tqdm(total=len(files), unit="image", disable=not folder and len(files) <= FEW) as bar,
    ):
        for result in predict(model, files, topk=topk, batch_size=arguments.batch_size):
            bar.update()
            if isinstance(result, InputError):
                status = 1
                tqdm.write(escaped(str(result), one_line=True), file=sys.stderr)
                continue
            emit(result)
            if arguments.csv:
                file.write(_csv(result, heading=heading))
            elif not arguments.json:
                _say(_csv(result, heading=heading) if folder else _text(result))
            heading = False
    sys.stdout.flush()  # a closed pipe shows here, where it is caught, not at exit
    return status


def _check_csv(file: storage.Path | None, inputs: list[str | Path]) -> None:
    """Raises InputError where --csv would take the place of a picture or of the model."""
    if file is None:
        return
    if file.suffix.lower() in pictures.SUFFIXES:  # `--csv *.png`, whose first one is the value
        raise InputError(f"--csv is {file}, a name of an image; name a file such as found.csv")
    check_no_input("--csv", file, inputs)


@contextlib.contextmanager
def _whole(csv_file: storage.Path | None) -> Iterator[Path]:
    """Gives a file to write that gets the name of the CSV once it is complete."""
    if csv_file is None:
        yield Path(os.devnull)
    elif storage.is_remote(csv_file):
        with storage.uploaded(csv_file) as part:
            yield part
    else:
        part = csv_file.with_name(f"{csv_file.name}.part")
        yield part
        part.replace(csv_file)


def find_images(paths: list[str]) -> list[Path]:
    """Returns files as given, and the images in folders, each folder's sorted by path.

    What else folders hold is named on stderr.

    Raises:
      InputError: a path does not exist, or a folder holds no image.
    """
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            found = walk(str(path))
            if found.passed_over:
                log_error(f"note: {printable(str(path))}: no images: {describe(found.passed_over)}")
            if not (images := sorted(path / image for image in found.paths() + found.unreadable)):
                expected = " ".join(pictures.SUFFIXES)
                raise InputError(f"{path} holds no image: expected files {expected}")
            files += images
        elif path.is_file():
            files.append(path)
        elif path.exists():  # a pipe, which may never say anything
            raise InputError(f"{path} is neither a file nor a folder")
        else:
            raise InputError(f"{path}: no such image file or folder; check the path")
    return files


def _say(text: str) -> None:
    """Writes to stdout above the progress bar, which may share the terminal."""
    tqdm.write(escaped(text), file=sys.stdout, end="")


def _text(result: dict[str, Any]) -> str:
    lines = [printable(result["file"])]
    for rank, found in enumerate(result["predictions"], 1):
        lines.append(f"{rank:4} {100 * found['probability']:7.2f} %  {printable(found['name'])}")
    for head, (found, *_) in result.get("heads", {}).items():
        lines.append(
            f"     {100 * found['probability']:6.2f} %  {printable(found['name'])}  ({head} head)"
        )
    return "\n".join(lines) + "\n"


def _csv(result: dict[str, Any], *, heading: bool) -> str:
    found = {str(rank): one for rank, one in enumerate(result["predictions"], 1)}
    found |= {f"{head}-head": top[0] for head, top in result.get("heads", {}).items()}
    row = {"file": result["file"]}
    row |= {f"{key}-{n}": one[key] for n, one in found.items() for key in ("name", "probability")}
    text = io.StringIO()
    writer = csv.DictWriter(text, row, lineterminator="\n")
    if heading:
        writer.writeheader()
    writer.writerow(row)
    return text.getvalue()
