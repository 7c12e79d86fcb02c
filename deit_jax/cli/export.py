"""Exports a model as a StableHLO program, which plain JAX runs without deit-jax.

deit-jax export --model runs/digits --out digits
deit-jax export --model hf:timm/deit3_base_patch16_224.fb_in1k --out deit3_b --dtype bfloat16
deit-jax export --model runs/digits --out digits --features --platforms cpu

The program takes uint8 images of any number, resized and cropped, and returns probabilities and the
logits of each head. docs/export.md has the lines that run it.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial

from deit_jax import storage
from deit_jax.cli.arguments import a_path, one_or_more
from deit_jax.console import log
from deit_jax.errors import InputError, brief

RECIPE = ""


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the flags."""
    add = parser.add_argument
    add("--model", required=True, help="model or run folder, PyTorch file, URL or hf:OWNER/NAME")
    add("--out", required=True, type=a_path, metavar="DIR", help="folder to write")
    where = ("cpu", "cuda", "tpu")
    add("--platforms", nargs="+", choices=where, default=where, help="where it runs (default: all)")
    add("--features", action="store_true", help="return the pooled features, too")
    size = partial(one_or_more, most=2**14)
    add("--image_size", type=size, metavar="N", help="side in pixels, if not the model's")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the matmuls")


def run(arguments: Namespace, emit: Callable[[object], None]) -> None:
    """Exports; --out is whole or absent."""
    out = arguments.out
    if storage.exists(out):
        raise InputError(f"--out {out} exists; choose another path, or remove it")
    from deit_jax.convert.load import load_model
    from deit_jax.inference.export import export_model

    model = load_model(arguments.model, image_size=arguments.image_size, dtype=arguments.dtype)
    try:
        with storage.new_folder(out) as fresh:
            outputs = export_model(
                fresh, model, platforms=arguments.platforms, features=arguments.features
            )
    except OSError as error:
        raise InputError(f"--out {out} cannot be written ({brief(error)})") from error
    log(f"{out}: {model.info.name} for {', '.join(arguments.platforms)}; {', '.join(outputs)}")
    emit({"out": str(out), "name": model.info.name, "outputs": outputs})
