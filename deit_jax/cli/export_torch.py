"""Converts a model folder into a PyTorch file.

deit-jax export-torch --src runs/deit_b/model --dst deit_b.safetensors --format timm
deit-jax export-torch --src runs/deit_b/model --dst deit_b.pth --format fb
deit-jax export-torch --src runs/deit_b/model --dst deit_b_hf --format hf

timm: the state dict that timm loads. fb: the reference's names, in a .pth under "model". hf: a
folder that transformers loads with from_pretrained. torchvision: RegNetY in torchvision's names.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable

from deit_jax import storage
from deit_jax.cli.arguments import a_path
from deit_jax.console import log
from deit_jax.errors import InputError

RECIPE = ""


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the flags."""
    add = parser.add_argument
    add("--src", required=True, type=a_path, metavar="DIR", help="model folder, or run folder")
    add("--dst", required=True, type=a_path, help=".safetensors or .pth to write; hf: a folder")
    add("--format", choices=("timm", "fb", "hf", "torchvision"), required=True)
    add("--allow_nonfinite", action="store_true", help="write NaN and infinity as they are")
    add("--overwrite", action="store_true", help="replace what is at --dst")


def run(arguments: Namespace, emit: Callable[[object], None]) -> None:
    """Converts; --dst is whole or absent."""
    from deit_jax.convert import huggingface, to_torch

    target, form = arguments.dst, arguments.format
    if storage.exists(target):
        if not arguments.overwrite:
            raise InputError(f"--dst {target} exists; choose another path, or add --overwrite")
        if target.is_dir() and not (form == "hf" and huggingface.is_ours(target)):
            raise InputError(f"--dst {target} is a folder that this tool did not write")
        if not target.is_dir() and form == "hf":
            raise InputError(f"--dst {target} is a file; --format hf writes a folder")
    info = to_torch.write(arguments.src, target, form, allow_nonfinite=arguments.allow_nonfinite)
    unseen = set(dict(info.overrides)) - {"patch_size", "distilled"}
    if unseen and target.suffix != ".safetensors" and form in ("timm", "torchvision"):
        log(
            f"note: nothing in {target.name} says that {', '.join(sorted(unseen))} differ from "
            f"{info.name}'s; a .safetensors file would"
        )
    log(f"{target}: {info.name}, {info.num_classes} classes, format {form}")
    emit({"dst": str(target), "format": form, "name": info.name, "num_classes": info.num_classes})
