"""Converts a model folder into a PyTorch file.

python tools/jax_to_torch.py --src runs/deit_b/model --dst deit_b.safetensors --format timm
python tools/jax_to_torch.py --src runs/deit_b/model --dst deit_b.pth --format fb
python tools/jax_to_torch.py --src runs/deit_b/model --dst deit_b_hf --format hf

timm: the state dict that timm loads. fb: the reference's names, in a .pth under "model". hf: a
folder that transformers loads with from_pretrained. torchvision: RegNetY in torchvision's names.
"""

import argparse
import os
import sys
from pathlib import Path

from deit_jax.convert import huggingface, to_torch
from deit_jax.errors import InputError, exit_status


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--src", required=True, type=Path, help="model folder, or run folder")
    parser.add_argument(
        "--dst", required=True, type=Path, help=".safetensors or .pth to write; hf: a folder"
    )
    parser.add_argument("--format", choices=to_torch.FORMATS, required=True)
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --dst")
    return parser.parse_args(argv)


def convert(arguments: argparse.Namespace) -> None:
    """Does what the arguments say. Raises InputError for bad input; --dst is whole or absent."""
    target = arguments.dst
    if os.path.lexists(target):
        if not arguments.overwrite:
            raise InputError(f"--dst {target} exists; choose another path, or add --overwrite")
        is_folder = target.is_dir()
        if is_folder and not (arguments.format == "hf" and huggingface.is_ours(target)):
            raise InputError(f"--dst {target} is a folder that this tool did not write")
        if not is_folder and arguments.format == "hf":
            raise InputError(f"--dst {target} is a file; --format hf writes a folder")
    info = to_torch.write(arguments.src, target, arguments.format)
    unseen = set(dict(info.overrides)) - {"patch_size", "distilled"}
    bare = target.suffix != ".safetensors" and arguments.format in ("timm", "torchvision")
    if unseen and bare:
        print(
            f"note: nothing in {target.name} says that {', '.join(sorted(unseen))} differ from "
            f"{info.name}'s; a .safetensors file would"
        )
    print(f"{target}: {info.name}, {info.num_classes} classes, format {arguments.format}")


def main(argv: list[str] | None = None) -> int:
    """Converts; returns the exit status."""
    arguments = _arguments(argv)
    return exit_status(lambda: convert(arguments))


if __name__ == "__main__":
    sys.exit(main())
