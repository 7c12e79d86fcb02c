"""Draws what a model's class token attends to in pictures.

deit-jax attention --model runs/mine/model cat.jpg dog.png --out attention.png
deit-jax attention --model hf:facebook/deit-tiny-patch16-224 cat.jpg --block 0 --out first.png
deit-jax attention --model runs/mine/model cat.jpg --token distillation --out attention.png

Each picture is a row: as the model sees it; the attention rollout through all blocks, where the
model has one; the mean of one block's heads; and each of its heads. The brighter a patch, the more
attention it gets; the brightest is drawn as it is. What goes to the other tokens stands below.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from deit_jax import storage
from deit_jax.cli.arguments import check_no_input, new_file
from deit_jax.console import log
from deit_jax.drawing import draw
from deit_jax.errors import InputError
from deit_jax.folders import printable

if TYPE_CHECKING:
    from deit_jax.models.vit import VisionTransformer

RECIPE = ""
TOKENS = ("class", "distillation")
_DARKEST = 0.1  # of a patch that gets nothing


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the flags."""
    add = parser.add_argument
    add("--model", required=True, help="model or run folder, PyTorch file, URL or hf:OWNER/NAME")
    add("images", nargs="+", metavar="IMAGE", help="image file")
    add("--out", required=True, type=new_file, metavar="PNG", help="file to write")
    add("--block", type=int, default=-1, metavar="N", help="from 0; -1: the last (default)")
    add("--token", choices=TOKENS, default="class", help="whose attention (default: class)")


def run(arguments: Namespace, emit: Callable[[object], None]) -> None:
    """Draws."""
    if arguments.out.suffix.lower() != ".png":
        raise InputError(f"--out is {arguments.out}, expected a name that ends in .png")
    check_no_input("--out", arguments.out, arguments.images)
    from deit_jax.convert.load import load_model
    from deit_jax.inference.preprocess import preprocess

    model = load_model(arguments.model)
    if arguments.token == "distillation" and not getattr(model, "distilled", False):
        raise InputError(f"--token is distillation, but a {model.info.name} has a class token only")
    if model.has_attention:
        _check_block(model, arguments.block)
    tiles, captions = [], []
    for file in arguments.images:
        images = preprocess(model, file)
        row = maps(model, images, arguments.block, TOKENS.index(arguments.token))
        pixels = images[0] * np.float64(model.info.std) + np.float64(model.info.mean)
        tiles.append(np.rint(255 * pixels).astype(np.uint8))
        captions.append(printable(file))
        for name, weights in row.items():
            tiles.append(_shaded(pixels, weights))
            captions.append(f"{name}\nto other tokens {1 - weights.sum():.2f}")
    block = "last block" if arguments.block == -1 else f"block {arguments.block}"
    title = f"{model.info.name} · {arguments.token} token · {block}"
    sheet = draw(tiles, captions, title=title, columns=len(row) + 1)
    with storage.uploaded(arguments.out) as file:
        sheet.save(file)
    log(f"{arguments.out}: {sheet.width}×{sheet.height} pixels")
    emit({"out": str(arguments.out), "width": sheet.width, "height": sheet.height})


def _check_block(model: "VisionTransformer", block: int) -> None:
    count = model.attention_depth
    if not -count <= block < count:
        raise InputError(
            f"--block is {block}, but a {model.info.name} has blocks 0 to {count - 1}, or "
            f"-{count} to -1 from the end"
        )


def maps(
    model: "VisionTransformer", images: np.ndarray, block: int, token: int
) -> dict[str, np.ndarray]:
    """Returns what one token takes from each patch of the first image, by name.

    Args:
      model: with attention.
      images: the model's input, [1, S, S, 3].
      block: its number, from 0, or below 0 from the end.
      token: whose row.

    Returns:
      "rollout" (where the model has one), "mean of heads" and "head 0" onwards, each [h, w].

    Raises:
      InputError: no such block, or none with that token.
    """
    if not model.has_attention:
        raise InputError(f"a {model.info.name} has no attention to draw")
    (heads,) = model.attention_weights(images, [block])
    heads = np.asarray(heads)[0, :, token]
    rows, columns = model.grid
    if heads.shape[-1] < rows * columns + model.num_prefix:
        raise InputError(f"block {block} of a {model.info.name} has no class token; take the last")
    found = {"mean of heads": heads.mean(0)}
    found |= {f"head {number}": weights for number, weights in enumerate(heads)}
    if model.has_rollout:
        rollout = np.asarray(model.attention_rollout(images))[0, token]
        found = {"rollout": rollout} | found
    return {
        name: weights[model.patch_tokens].reshape(rows, columns) for name, weights in found.items()
    }


def _shaded(pixels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Darkens the patches [h,w] of little weight in a picture [S,S,3] of values from 0 to 1."""
    size = pixels.shape[1], pixels.shape[0]
    share = Image.fromarray(np.float32(weights / weights.max())).resize(size, Image.BILINEAR)
    light = _DARKEST + (1 - _DARKEST) * np.asarray(share, np.float64)[..., None]
    return np.rint(255 * (pixels * light).clip(0, 1)).astype(np.uint8)
