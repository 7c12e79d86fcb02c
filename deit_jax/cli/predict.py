"""Says what is in pictures, with any model folder.

python tools/predict.py --model runs/mine/model cat.jpg dog.png     # the five likeliest classes
python tools/predict.py --model runs/mine/model photos > found.csv  # a folder, with all below it
python tools/predict.py --model runs/mine/model photos --csv found.csv --topk 1 --batch_size 64
python tools/predict.py --model runs/mine/model photos --json       # a JSON object a line

A distilled model predicts with the mean of its two heads' logits; what each head alone says stands
beside it. Text shows percent, CSV and JSON hold probabilities from 0 to 1. A picture that cannot be
read is named on stderr and left out, and the exit status is then 1; other mistakes end with 2.
"""

import contextlib
import csv
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

import deit_jax
from deit_jax.config.flags import Parser
from deit_jax.errors import InputError, brief, exit_status
from deit_jax.models import imagenet

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
HEADS = ("class", "distillation")  # in the order of `model.heads`
FEW = 4  # so many pictures need no progress bar

Result = dict[str, Any]  # a picture's line of JSON


def main(argv: list[str] | None = None) -> int:
    """Predicts, prints or writes; returns the exit status."""
    return exit_status(lambda: _run(_arguments(argv)))


def _arguments(argv: list[str] | None) -> Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="model folder, or the run that holds it")
    add("images", nargs="+", metavar="IMAGE", help="image file, or folder searched with all below")
    add("--topk", type=int, default=5, help="classes to name, at most all (default: 5)")
    add("--batch_size", type=int, default=16, help="pictures computed at once (default: 16)")
    add("--json", action="store_true", help="print one JSON object a line for each picture")
    add("--csv", type=Path, metavar="FILE", help="write a CSV, complete or not at all")
    arguments = parser.parse_args(argv)
    for name in ("topk", "batch_size"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} is {getattr(arguments, name)}, expected 1 or more")
    if arguments.csv and not os.access(arguments.csv.absolute().parent, os.W_OK):
        raise InputError(f"--csv {arguments.csv}: its folder is missing or cannot be written to")
    if arguments.csv and arguments.csv.is_dir():
        raise InputError(f"--csv {arguments.csv} is a folder, expected the file to write")
    return arguments


def find_images(paths: list[str]) -> list[Path]:
    """Returns files as given, and folders' images by suffix, each folder's sorted by path.

    Raises InputError for a path that does not exist and a folder without images.
    """
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            # Not rglob: class folders are often links, and it follows none.
            below = [Path(at, name) for at, _, n in os.walk(path, followlinks=True) for name in n]
            images = sorted(file for file in below if file.suffix.lower() in SUFFIXES)
            if not images:
                raise InputError(f"{path} holds no image: expected files {' '.join(SUFFIXES)}")
            files += images
        elif path.exists():
            files.append(path)
        else:
            raise InputError(f"{path}: no such image file or folder; check the path")
    return files


def _run(arguments: Namespace) -> int:
    """Predicts and reports; returns 1 where some pictures could not be read, else 0."""
    files = find_images(arguments.images)
    model = deit_jax.load_model(arguments.model)
    topk = min(arguments.topk, model.info.num_classes)
    folder = any(os.path.isdir(path) for path in arguments.images)
    results = predict(model, files, topk=topk, batch_size=arguments.batch_size)
    status = 0
    with (
        tqdm(total=len(files), unit="image", disable=not folder and len(files) <= FEW) as bar,
        contextlib.ExitStack() as stack,
    ):
        reporters = []
        if arguments.json:
            reporters.append(lambda result: _say(json.dumps(result, ensure_ascii=False) + "\n"))
        if arguments.csv:
            file = stack.enter_context(_whole_file(arguments.csv))
            reporters.append(_csv_reporter(file.write, model, topk))
        elif folder and not arguments.json:
            reporters.append(_csv_reporter(_say, model, topk))
        for result in results:
            if isinstance(result, InputError):
                status = 1
                tqdm.write(str(result), file=sys.stderr)
            else:
                for report in reporters or [_print_text]:
                    report(result)
            bar.update()
        sys.stdout.flush()  # a closed pipe shows here, where it is caught, not at exit
    return status


def predict(
    model: Any, files: list[Path], *, topk: int, batch_size: int
) -> Iterator[Result | InputError]:
    """Yields each file's prediction in order, or the error that says why it has none.

    A result holds `file`, `predictions` (`topk` of them, likeliest first: class, name, index and
    probability 0..1) and for distilled models `heads`, the same for each head alone.

    Raises InputError for a model that cannot predict.
    """
    import jax  # here, for it takes a second that --help and a misspelt path should not cost

    from deit_jax.models.network import split_model

    info = model.info
    classes = info.class_names or tuple(f"class {i}" for i in range(info.num_classes))
    # A description that no picture can be prepared with fails here, not once for each picture.
    blank = deit_jax.preprocess(info, np.zeros((1, 1, 3), np.uint8))[0]
    network, variables = split_model(model)
    forward = jax.jit(lambda variables, images: network(variables, images)[0])

    batch_size = min(batch_size, len(files))
    chunks = [files[i : i + batch_size] for i in range(0, len(files), batch_size)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # One batch ahead and no more: pictures wait in memory until they are computed.
        ahead = pool.map(lambda file: _read(info, file), chunks[0])
        for chunk, following in zip(chunks, [*chunks[1:], []], strict=True):
            read, ahead = list(ahead), pool.map(lambda file: _read(info, file), following)
            images = [blank if isinstance(image, InputError) else image for image in read]
            images += [blank] * (batch_size - len(chunk))  # one shape, one compilation
            heads = [np.asarray(head, np.float32) for head in forward(variables, np.stack(images))]
            for row, (file, image) in enumerate(zip(chunk, read, strict=True)):
                if isinstance(image, InputError):
                    yield image
                else:
                    yield _result(file, [head[row] for head in heads], classes, topk)


def _read(info: Any, file: Path) -> np.ndarray | InputError:
    """The model's input [S,S,3]."""
    try:
        return deit_jax.preprocess(info, file)[0]
    except InputError as error:
        return error
    except Exception as error:  # Pillow's decoders raise all sorts for damaged files
        return InputError(f"{file}: cannot be read as an image ({brief(error)})")


def _result(file: Path, heads: list[np.ndarray], classes: tuple[str, ...], topk: int) -> Result:
    """`heads` are the logits [K] of each."""
    if not np.isfinite(heads).all():
        raise InputError(f"{file}: the logits are not finite; have these weights diverged?")
    mean = sum(heads) / len(heads)  # of the logits, as the model itself
    result = {"file": str(file), "predictions": _top(mean, classes, topk)}
    if len(heads) > 1:
        each = zip(HEADS, heads, strict=True)
        result["heads"] = {name: _top(logits, classes, topk) for name, logits in each}
    return result


def _top(logits: np.ndarray, classes: tuple[str, ...], topk: int) -> list[dict[str, Any]]:
    exponents = np.exp(logits - logits.max())
    probabilities = exponents / exponents.sum()
    return [
        {
            "class": classes[i],
            "name": imagenet.readable(classes[i]),
            "index": int(i),
            "probability": float(f"{probabilities[i]:.6g}"),
        }
        for i in np.argsort(-logits, kind="stable")[:topk]
    ]


def _say(text: str) -> None:
    """Writes to stdout above the progress bar, which may share the terminal."""
    tqdm.write(text, file=sys.stdout, end="")


def _print_text(result: Result) -> None:
    lines = [result["file"]]
    for rank, found in enumerate(result["predictions"], 1):
        lines.append(f"{rank:4} {100 * found['probability']:7.2f} %  {found['name']}")
    for head, (found, *_) in result.get("heads", {}).items():
        lines.append(f"     {100 * found['probability']:6.2f} %  {found['name']}  ({head} head)")
    _say("\n".join(lines) + "\n")


def _csv_reporter(
    write: Callable[[str], object], model: Any, topk: int
) -> Callable[[Result], object]:
    """Writes the heading, and returns what writes a result's row: all ranks, then each head."""
    columns = [str(rank) for rank in range(1, topk + 1)]
    if getattr(model, "distilled", False):
        columns += [f"{head}-head" for head in HEADS]
    writer = csv.writer(SimpleNamespace(write=write), lineterminator="\n")
    writer.writerow(["file", *(f"{kind}-{c}" for c in columns for kind in ("name", "probability"))])

    def report(result: Result) -> None:
        found = result["predictions"] + [top[0] for top in result.get("heads", {}).values()]
        cells = [cell for one in found for cell in (one["name"], one["probability"])]
        writer.writerow([result["file"], *cells])

    return report


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[TextIO]:
    """A text file that has its name only once it is complete; until then it is PATH.part."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        yield file
    part.replace(path)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be no text
    sys.exit(main())
