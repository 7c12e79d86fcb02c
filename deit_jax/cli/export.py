"""Exports a model as a program that runs without deit-jax: StableHLO for JAX, or ONNX.

deit-jax export --model runs/digits --out digits
deit-jax export --model hf:timm/deit3_base_patch16_224.fb_in1k --out deit3_b --dtype bfloat16
deit-jax export --model runs/digits --out digits --features --platforms cpu
deit-jax export --model runs/digits --out digits_onnx --format onnx

The program takes uint8 images of any number, resized and cropped, and returns probabilities and the
logits of each head. docs/export.md has the lines that run it. An ONNX program is written once
onnxruntime computes the same with it.
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
    add("--format", choices=("stablehlo", "onnx"), default="stablehlo", help="of the program")
    where = ("cpu", "cuda", "tpu")
    add("--platforms", nargs="+", choices=where, help="where StableHLO runs (default: all)")
    add("--features", action="store_true", help="return the pooled features, too")
    size = partial(one_or_more, most=2**14)
    add("--image_size", type=size, metavar="N", help="side in pixels, if not the model's")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the matmuls")


def run(arguments: Namespace, emit: Callable[[object], None]) -> None:
    """Exports; --out is whole or absent."""
    out, onnx = arguments.out, arguments.format == "onnx"
    if storage.exists(out):
        raise InputError(f"--out {out} exists; choose another path, or remove it")
    if onnx and arguments.platforms:
        raise InputError(
            "--platforms is for StableHLO; an ONNX program runs wherever its runtime does"
        )
    if onnx and arguments.dtype != "float32":
        raise InputError(f"--dtype {arguments.dtype}: an ONNX program computes in float32")
    from deit_jax.convert.load import load_model
    from deit_jax.inference import export, onnx_program

    if onnx:
        onnx_program.check()
    model = load_model(arguments.model, image_size=arguments.image_size, dtype=arguments.dtype)
    features, platforms = arguments.features, arguments.platforms or export.PLATFORMS
    try:
        with storage.new_folder(out) as fresh:
            if onnx:
                outputs, error = onnx_program.export_onnx(fresh, model, features=features)
                where = f"ONNX, in onnxruntime equal within {error:.1e}"
            else:
                outputs = export.export_model(fresh, model, platforms=platforms, features=features)
                where = ", ".join(platforms)
    except OSError as error:
        raise InputError(f"--out {out} cannot be written ({brief(error)})") from error
    log(f"{out}: {model.info.name} for {where}; {', '.join(outputs)}")
    emit({"out": str(out), "name": model.info.name, "outputs": outputs})
