"""Exports a model as a StableHLO program, which plain JAX runs without deit-jax."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx
from jax import export

from deit_jax import trees
from deit_jax.errors import InputError
from deit_jax.inference.predict import HEADS
from deit_jax.models.info import ModelInfo
from deit_jax.models.network import join_model, split_model
from deit_jax.parallel import devices

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM, WEIGHTS, ABOUT = "program.stablehlo", "weights.safetensors", "about.json"


def export_model(
    folder: Path,
    model: nnx.Module,
    *,
    platforms: Sequence[str] = PLATFORMS,
    features: bool = False,
) -> list[str]:
    """Writes a program, its weights and their description as three files.

    The program takes (weights, images): a dict of the weights by their names in the file, and uint8
    pixels [B, H, W, 3] of the model's size, for any B. It returns a dict of float32 arrays:
    `probabilities` and the logits of each head, `logits_class` and perhaps `logits_distillation`,
    [B, K], and on request `features` [B, D].

    Args:
      folder: to be created, or empty.
      model: with its ModelInfo as `info`.
      platforms: where the program is to run.
      features: the pooled features, too.

    Returns:
      The names of the outputs.

    Raises:
      InputError: there would be no output.
    """
    info = model.info
    program, weights = as_function(model, features=features)
    images = jax.ShapeDtypeStruct((*export.symbolic_shape("batch"), *size_of(info), 3), jnp.uint8)
    with devices.anywhere():
        exported = export.export(jax.jit(program), platforms=platforms)(weights, images)
    outputs = sorted(exported.out_tree.unflatten(exported.out_avals))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PROGRAM).write_bytes(exported.serialize())
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in weights.items()}
    safetensors.numpy.save_file(arrays, folder / WEIGHTS)
    describe(folder, info, platforms=list(platforms), outputs=outputs, jax=jax.__version__)
    return outputs


def as_function(
    model: nnx.Module, *, features: bool
) -> tuple[Callable[[dict, jax.Array], dict[str, jax.Array]], dict[str, jax.Array]]:
    """Returns the program of `export_model` as a function of weights and images, and the weights.

    Raises:
      InputError: it would have no output.
    """
    info = model.info
    if not info.num_classes and not features:
        raise InputError(f"this {info.name} has no classes: export its features (--features)")
    network, variables = split_model(model)
    weights = trees.flat(variables)
    names, structure = list(weights), jax.tree.structure(variables)

    def program(weights: dict[str, jax.Array], images: jax.Array) -> dict[str, jax.Array]:
        leaves = [weights[name] for name in names]
        model = _portable(join_model(network, jax.tree.unflatten(structure, leaves)))
        mean, std = (jnp.asarray(x, jnp.float32).reshape(1, 1, 1, 3) for x in (info.mean, info.std))
        pixels = (images.astype(jnp.float32) / 255 - mean) / std
        outputs = {"features": model.features(pixels)} if features else {}
        if info.num_classes:
            heads = model.heads(pixels)
            outputs |= {f"logits_{name}": x for name, x in zip(HEADS, heads, strict=False)}
            outputs["probabilities"] = jax.nn.softmax(sum(heads) / len(heads))
        return outputs

    return program, weights


def size_of(info: ModelInfo) -> tuple[int, int]:
    """Returns height and width of the images."""
    height, width = np.broadcast_to(info.image_size, 2)
    return int(height), int(width)


def describe(folder: Path, info: ModelInfo, **more: object) -> None:
    """Writes what travels beside a program: class names, preprocessing and its outputs."""
    text = json.dumps(more | info.to_json(), indent=2, ensure_ascii=False) + "\n"
    (folder / ABOUT).write_text(text, encoding="utf-8")


def _portable(model: nnx.Module) -> nnx.Module:
    """Returns the model, to be evaluated with attention that every device computes."""
    model.eval()
    for _, module in nnx.iter_modules(model):
        if hasattr(module, "implementation"):
            module.implementation = "xla"
    return model
