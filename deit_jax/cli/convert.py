"""Converts PyTorch weights of any of the models (deit-jax list-models) into a model folder.

deit-jax convert --src deit_base_distilled_patch16_224-df68dfff.pth --dst models/deit_b
deit-jax convert --src https://HOST/regnety_160-a5fe301d.pth --dst models/regnety_160
deit-jax convert --src hf:OWNER/NAME --dst DIR --num_classes 10 --image_size 384

Reads files of the reference, timm, Hugging Face and torchvision (.pth, .bin, .safetensors, folders
with a config.json), and finds out which model it is. With another --model, --image_size or
--num_classes than the file's, the weights are made to fit; what is new or dropped is printed. So is
how images are prepared where the file does not say it (--mean, --std, --crop_ratio,
--interpolation).
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

from deit_jax import storage
from deit_jax.cli.arguments import a_path, fraction, one_or_more
from deit_jax.console import log
from deit_jax.errors import InputError, brief

RECIPE = ""


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the flags."""
    add = parser.add_argument
    add("--src", required=True, help="file, folder, https:// URL or hf:OWNER/NAME")
    add("--dst", required=True, type=a_path, metavar="DIR", help="model folder to write")
    add("--model", metavar="NAME", help="registered name, if not the file's")
    size, classes = partial(one_or_more, most=2**14), partial(one_or_more, most=2**24)
    add("--image_size", type=size, metavar="N", help="side in pixels, if not the model's")
    add("--num_classes", type=classes, metavar="N", help="if not the file's: new heads")
    add(
        "--pos_embed",
        choices=("reference", "timm"),
        default="reference",
        help="how position embeddings are resized",
    )
    add("--weights", choices=("raw", "ema"), default="raw", help="which of a training checkpoint")
    add("--class_names", type=Path, metavar="FILE", help="text file, one class name a line")
    add("--allow_nonfinite", action="store_true", help="take NaN and infinity as they are")
    colours = {"type": fraction, "nargs": 3, "metavar": ("R", "G", "B")}
    add("--mean", **colours, help="of training pixels from 0 to 1, if not the file's or the usual")
    add("--std", **colours, help="likewise")
    whole = "evaluation: centre crop / resized short side; 0: resizes the whole image"
    add("--crop_ratio", type=fraction, metavar="N", help=whole)
    add("--interpolation", choices=("bicubic", "bilinear"), help="of evaluation")
    add("--overwrite", action="store_true", help="replace a model folder at --dst")


def run(arguments: Namespace, emit: Callable[[object], None]) -> None:
    """Converts; --dst is whole or absent."""
    import numpy as np

    from deit_jax import trees
    from deit_jax.checkpoints import model_folder
    from deit_jax.convert import download, from_torch
    from deit_jax.models import registry

    # What can be checked before anything is read or downloaded.
    if arguments.model is not None:
        registry.model_options(arguments.model)
    target = arguments.dst
    exists = storage.exists(target)
    if exists and not (target / "model.json").is_file():
        raise InputError(f"--dst {target} exists and is not a model folder; choose another path")
    if exists and not arguments.overwrite:
        raise InputError(f"--dst {target} exists; choose another path, or add --overwrite")
    names = _class_names(arguments.class_names) if arguments.class_names else None
    asked = _asked(arguments)
    source = download.fetch(arguments.src)
    if model_folder.find_model(source) == storage.path_of(source, "model"):
        raise InputError(
            f"--src {arguments.src} is a run of deit-jax already; name it as it is to predict, "
            "eval or --config.init_from"
        )
    if not storage.is_remote(target) and target.resolve() in [
        source.resolve(),
        *source.resolve().parents,
    ]:
        raise InputError(f"--dst {target} is or holds the source; choose another path")

    converted = from_torch.read(
        source,
        weights=arguments.weights,
        allow_nonfinite=arguments.allow_nonfinite,
        asked=asked,
        model=arguments.model,
    )
    log(f"{arguments.src}: {converted.info.name}, {converted.layout} names")
    converted = from_torch.adapt(
        converted,
        model=arguments.model,
        num_classes=arguments.num_classes,
        image_size=arguments.image_size,
        class_names=names,
        kernel=arguments.pos_embed,
    )
    for note in converted.notes:
        log(f"note: {note}")
    info, variables = converted.info, converted.variables
    model_folder.write_model(target, variables, info)
    parameters = trees.param_count(variables.params)
    sides = "×".join(map(str, np.broadcast_to(info.image_size, 2)))
    log(f"{target}: {info.name}, {parameters:,} parameters, {sides}, {info.num_classes} classes")
    result = {"dst": str(target), "parameters": parameters, "notes": list(converted.notes)}
    emit(result | {key: getattr(info, key) for key in ("name", "num_classes", "image_size")})


def _asked(arguments: Namespace) -> dict[str, object]:
    """Returns how images are to be prepared, as far as the flags say."""
    from deit_jax.convert.preprocessing import FIELDS

    asked = {name: getattr(arguments, name) for name in FIELDS}
    asked = {name: tuple(x) if isinstance(x, list) else x for name, x in asked.items()}
    asked = {name: value for name, value in asked.items() if value is not None}
    if 0 in asked.get("std", ()):
        raise InputError("--std has a 0, expected three numbers above 0 and at most 1")
    return asked | ({"crop_ratio": None} if asked.get("crop_ratio") == 0 else {})


def _class_names(file: Path) -> tuple[str, ...]:
    try:
        return tuple(file.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--class_names {file} cannot be read ({brief(error)})") from error
