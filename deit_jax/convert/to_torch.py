"""Writes a model folder as a PyTorch file: for timm, the reference, torchvision or transformers."""

import os

import numpy as np

from deit_jax import storage
from deit_jax.checkpoints import model_folder
from deit_jax.convert import buffers, huggingface, layouts, mapping, torch_files
from deit_jax.errors import InputError
from deit_jax.models import registry
from deit_jax.models.info import ModelInfo
from deit_jax.models.network import Variables

FORMATS = ("timm", "fb", "hf", "torchvision")
_LAYOUTS = {  # by format but "hf", and the model's family
    ("timm", "vit"): layouts.TIMM_VIT,
    ("fb", "vit"): layouts.REFERENCE,
    ("timm", "parallel"): layouts.TIMM_PARALLEL,
    ("fb", "parallel"): layouts.REFERENCE_PARALLEL,
    ("timm", "cait"): layouts.CAIT,
    ("fb", "cait"): layouts.CAIT,
    ("timm", "resmlp"): layouts.TIMM_RESMLP,
    ("fb", "resmlp"): layouts.REFERENCE_RESMLP,
    ("timm", "regnet"): layouts.TIMM_REGNET,
    ("fb", "regnet"): layouts.TIMM_REGNET,
    ("torchvision", "regnet"): layouts.TORCHVISION,
}


def layout(info: ModelInfo, form: str) -> layouts.Layout:
    """Returns how a file of this format names the tensors of the model.

    Raises:
      InputError: the format does not know such models.
    """
    if not info.num_classes:
        raise InputError(f"this {info.name} has no classes: give it some by reset_classifier first")
    if form == "hf":
        return huggingface.layout(info)
    options = registry.options(info)
    if form == "timm" and (kind := options.get("rope", "none")) != "none":
        if kind == "vit5" or options["num_registers"] or options["norm"] != "layer":
            raise InputError(
                f"{info.name}: timm has RoPE-ViT without registers, and no ViT-5; only fb has it"
            )
        return layouts.TIMM_ROPE
    key = form, registry.family(info.name)
    if key not in _LAYOUTS:
        raise InputError(
            f"{info.name} has no --format {form}: torchvision has RegNetY, transformers (hf) ViT "
            "and distilled DeiT; timm and fb have all"
        )
    return _LAYOUTS[key]


def tensors(variables: Variables, info: ModelInfo, form: str) -> dict[str, np.ndarray]:
    """Returns the state dict of a model in the names of `form`, one of FORMATS."""
    names = layout(info, form)
    counts = info.num_batches_tracked
    weights = mapping.from_variables(variables, names, num_batches_tracked=counts)
    return weights | buffers.of(info, names)


def write(
    source: str | os.PathLike,
    path: str | os.PathLike,
    form: str,
    *,
    allow_nonfinite: bool = False,
) -> ModelInfo:
    """Writes a model folder as a PyTorch file, or, in the format "hf", as a folder.

    Args:
      source: the model folder, or a run folder with a `model/`.
      path: `.safetensors` or `.pth`; the state dict of "fb" lies under "model" in a `.pth`, as in
        the reference's files. With "hf", a folder.
      form: one of FORMATS.
      allow_nonfinite: writes NaN and infinity as they are.

    Returns:
      The model's description.

    Raises:
      InputError: not a model folder, a format that does not know the model, a value that is not
        finite, or a full disk.
    """
    path = storage.path_of(path)
    network, like = model_folder.read_network(source)
    info = network.info
    layout(info, form)  # before the weights are read
    if form != "hf":
        torch_files.check_suffix(path)
    state = tensors(model_folder.read_variables(source, like), info, form)
    mapping.check_finite(state, str(source), allow=allow_nonfinite)
    if form == "hf":
        huggingface.write_folder(path, state, info)
    else:
        torch_files.write(path, state, info=info, container="model" if form == "fb" else None)
    return info
