"""Converts PyTorch weights of DeiT, DeiT III or RegNetY into a model folder.

python tools/torch_to_jax.py --src deit_base_distilled_patch16_224-df68dfff.pth --dst models/deit_b
python tools/torch_to_jax.py --src https://HOST/regnety_160-a5fe301d.pth --dst models/regnety_160
python tools/torch_to_jax.py --src hf:OWNER/NAME --dst DIR --num_classes 10 --image_size 384

Reads files of the reference, timm, Hugging Face and torchvision (.pth, .bin, .safetensors, folders
with a config.json), and finds out which model it is. With another --model, --image_size or
--num_classes than the file's, the weights are made to fit; what is new or dropped is printed.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from deit_jax import checkpoint, trees  # noqa: E402
from deit_jax.convert import download, from_torch, surgery  # noqa: E402
from deit_jax.errors import InputError, brief, exit_status  # noqa: E402
from deit_jax.models import registry  # noqa: E402


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--src", required=True, help="file, folder, https:// URL or hf:OWNER/NAME")
    parser.add_argument("--dst", required=True, type=Path, help="model folder to write")
    parser.add_argument("--model", help="registered name; needed where the file does not tell")
    parser.add_argument("--image_size", type=int, help="side in pixels, if not the file's")
    parser.add_argument("--num_classes", type=int, help="if not the file's: new heads")
    parser.add_argument(
        "--pos_embed",
        choices=surgery.KERNELS,
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
    _check_target(arguments.dst, arguments.overwrite)
    if arguments.model is not None:
        registry.model_options(arguments.model)
    names = None
    if arguments.class_names is not None:
        names = _class_names(arguments.class_names)
    source = download.fetch(arguments.src)
    named = arguments.model
    try:
        converted = from_torch.read(
            source, model=named, weights=arguments.weights, class_names=names
        )
    except InputError:
        if named is None:
            raise
        # Perhaps the file is another model, which has to be made to fit.
        converted = from_torch.read(source, weights=arguments.weights, class_names=names)
    found = converted.info
    converted = from_torch.adapt(
        converted,
        model=named,
        num_classes=arguments.num_classes,
        image_size=arguments.image_size,
        kernel=arguments.pos_embed,
    )
    print(f"{arguments.src}: {found.name}, {converted.layout} names", flush=True)
    for notice in converted.notices:
        print(f"note: {notice}", flush=True)
    info, variables = converted.info, converted.variables
    try:
        checkpoint.write_model(arguments.dst, variables, info)
    except (OSError, ValueError) as error:
        raise InputError(f"{arguments.dst} cannot be written ({brief(error)})") from error
    print(
        f"{arguments.dst}: {info.name}, {trees.param_count(variables.params):,} parameters, "
        f"{info.image_size}×{info.image_size}, {info.num_classes} classes"
    )


def _check_target(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not (folder / "model.json").is_file():
        raise InputError(f"--dst {folder} exists and is no model folder; choose another path")
    if not overwrite:
        raise InputError(f"--dst {folder} exists; choose another path, or add --overwrite")


def _class_names(file: Path) -> tuple[str, ...]:
    try:
        return tuple(file.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--class_names {file} cannot be read ({brief(error)})") from error


def main(argv: list[str] | None = None) -> int:
    """Converts; returns the exit status."""
    arguments = _arguments(argv)
    return exit_status(lambda: convert(arguments))


if __name__ == "__main__":
    sys.exit(main())
