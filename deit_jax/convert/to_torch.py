"""From a model folder to a PyTorch file."""

import os
from pathlib import Path

import numpy as np

from deit_jax.checkpoints import model_folder
from deit_jax.convert import huggingface, mapping, regnet_keys, torch_files, vit_keys
from deit_jax.convert.mapping import Layout
from deit_jax.errors import InputError
from deit_jax.models import registry
from deit_jax.models.info import ModelInfo
from deit_jax.models.network import Variables

FORMATS = ("timm", "fb", "hf", "torchvision")


def layout(info: ModelInfo, form: str) -> Layout:
    """How a file of this format names the tensors of the model.

    Raises InputError for a format that does not know such models.
    """
    is_vit = "embed_dim" in registry.model_options(info.name)
    layouts = {
        ("timm", True): vit_keys.TIMM,
        ("fb", True): vit_keys.REFERENCE,
        ("timm", False): regnet_keys.TIMM,
        ("fb", False): regnet_keys.TIMM,
        ("torchvision", False): regnet_keys.TORCHVISION,
    }
    if (form, is_vit) not in layouts:
        raise InputError(
            f"{info.name} has no --format {form}: torchvision has RegNetY, transformers (hf) ViT "
            "and distilled DeiT; timm and fb have all"
        )
    return layouts[form, is_vit]


def tensors(variables: Variables, info: ModelInfo, form: str) -> dict[str, np.ndarray]:
    """The state dict of a model in the names of `form`, one of FORMATS but "hf"."""
    return mapping.from_variables(
        variables, layout(info, form), num_batches_tracked=info.num_batches_tracked
    )


def write(source: str | os.PathLike, path: str | os.PathLike, form: str) -> ModelInfo:
    """Writes a model folder as a PyTorch file, or, in the format "hf", as a folder.

    Args:
      source: the model folder, or a run folder with a `model/`.
      path: `.safetensors` or `.pth`; the state dict of "fb" lies under "model" in a `.pth`, as in
        the reference's files. With "hf", a folder.
      form: one of FORMATS.

    Returns:
      The model's description.

    Raises:
      InputError: no model folder, a format that does not know the model, or a full disk.
    """
    network, like = model_folder.read_network(source)
    info = network.info
    if form == "hf":
        huggingface.check(info)
    else:
        layout(info, form)
        torch_files.check_suffix(Path(path))
    variables = model_folder.read_variables(source, like)
    if form == "hf":
        huggingface.write_folder(Path(path), variables, info)
    else:
        container = "model" if form == "fb" else None
        torch_files.write(path, tensors(variables, info, form), info=info, container=container)
    return info
