"""Converts PyTorch weights of DeiT, DeiT III or RegNetY into a model folder.

python tools/torch_to_jax.py --src deit_base_distilled_patch16_224-df68dfff.pth --dst models/deit_b
python tools/torch_to_jax.py --src https://HOST/regnety_160-a5fe301d.pth --dst models/regnety_160
python tools/torch_to_jax.py --src hf:OWNER/NAME --dst DIR --num_classes 10 --image_size 384

Reads files of the reference, timm, Hugging Face and torchvision (.pth, .bin, .safetensors, folders
with a config.json), and finds out which model it is. With another --model, --image_size or
--num_classes than the file's, the weights are made to fit; what is new or dropped is printed.
"""

import argparse
import os
import sys
from pathlib import Path

from deit_jax import trees
from deit_jax.checkpoints import model_folder
from deit_jax.checkpoints.fit import KERNELS
from deit_jax.convert import download, from_torch
from deit_jax.errors import InputError, brief, exit_status
from deit_jax.models import registry


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--src", required=True, help="file, folder, https:// URL or hf:OWNER/NAME")
    parser.add_argument("--dst", required=True, type=Path, help="model folder to write")
    parser.add_argument("--model", help="registered name, if not the file's")
    parser.add_argument("--image_size", type=int, help="side in pixels, if not the model's")
    parser.add_argument("--num_classes", type=int, help="if not the file's: new heads")
    parser.add_argument(
        "--pos_embed",
        choices=KERNELS,
        default="reference",
        help="how position embeddings are resized",
    )
    parser.add_argument(
        "--weights", choices=("raw", "ema"), default="raw", help="which of a training checkpoint"
    )
    parser.add_argument("--class_names", type=Path, help="text file, one class name a line")
    parser.add_argument("--overwrite", action="store_true", help="replace a model folder at --dst")
    return parser.parse_args(argv)


def convert(arguments: argparse.Namespace) -> None:
    """Does what the arguments say. Raises InputError for bad input; --dst is whole or absent."""
    _check_arguments(arguments)
    names = None
    if arguments.class_names is not None:
        names = _class_names(arguments.class_names)
    source = download.fetch(arguments.src)
    if arguments.dst.resolve() in [source.resolve(), *source.resolve().parents]:
        raise InputError(f"--dst {arguments.dst} is or holds the source; choose another path")
    converted = from_torch.read(source, weights=arguments.weights)
    print(f"{arguments.src}: {converted.info.name}, {converted.layout} names", flush=True)
    converted = from_torch.adapt(
        converted,
        model=arguments.model,
        num_classes=arguments.num_classes,
        image_size=arguments.image_size,
        class_names=names,
        kernel=arguments.pos_embed,
    )
    for notice in converted.notices:
        print(f"note: {notice}", flush=True)
    info, variables = converted.info, converted.variables
    try:
        model_folder.write_model(arguments.dst, variables, info)
    except (OSError, ValueError) as error:
        raise InputError(f"{arguments.dst} cannot be written ({brief(error)})") from error
    print(
        f"{arguments.dst}: {info.name}, {trees.param_count(variables.params):,} parameters, "
        f"{info.image_size}×{info.image_size}, {info.num_classes} classes"
    )


def _check_arguments(arguments: argparse.Namespace) -> None:
    """What can be checked before anything is read or downloaded."""
    if arguments.model is not None:
        registry.model_options(arguments.model)
    for name, largest in (("image_size", 2**14), ("num_classes", 2**24)):
        value = getattr(arguments, name)
        if value is not None and not 1 <= value <= largest:
            raise InputError(f"--{name} is {value}, expected 1 to {largest}")
    folder = arguments.dst
    if not os.path.lexists(folder):
        return
    if not (folder / "model.json").is_file():
        raise InputError(f"--dst {folder} exists and is no model folder; choose another path")
    if not arguments.overwrite:
        raise InputError(f"--dst {folder} exists; choose another path, or add --overwrite")


def _class_names(file: Path) -> tuple[str, ...]:
    try:
        lines = file.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--class_names {file} cannot be read ({brief(error)})") from error
    return tuple(line.removesuffix("\r") for line in lines)


def main(argv: list[str] | None = None) -> int:
    """Converts; returns the exit status."""
    arguments = _arguments(argv)
    return exit_status(lambda: convert(arguments))


if __name__ == "__main__":
    sys.exit(main())
