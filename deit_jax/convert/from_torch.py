"""Reads a PyTorch file into the weights and the description of one of our models."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from deit_jax.checkpoints import model_folder
from deit_jax.checkpoints.fit import fit
from deit_jax.convert import buffers, detect, huggingface, mapping, preprocessing, torch_files
from deit_jax.errors import InputError, brief
from deit_jax.models import imagenet, registry
from deit_jax.models.info import ModelInfo
from deit_jax.models.network import Variables, join_model, split_model


@dataclasses.dataclass(frozen=True)
class Converted:
    """A model read from a PyTorch file.

    Attributes:
      variables: NumPy arrays, possibly views of a file in memory.
      info: the model's description; `model.json` will hold it.
      layout: in whose names the file was.
      notes: what a person should know, a line each.
    """

    variables: Variables
    info: ModelInfo
    layout: str
    notes: tuple[str, ...] = ()

    def model(self, **more: Any) -> nnx.Module:
        """Builds the Flax model; `more` as for `registry.create_model`, for instance dtype."""
        network, _ = split_model(model_folder.build(self.info, registry.abstract_model, **more))
        return join_model(network, jax.tree.map(jax.numpy.asarray, self.variables))


def read(
    path: str | os.PathLike,
    *,
    weights: str = "raw",
    allow_nonfinite: bool = False,
    asked: Mapping[str, Any] | None = None,
    model: str | None = None,
) -> Converted:
    """Reads a `.pth`, a `.safetensors`, or a folder of transformers or timm.

    Layout and model are recognised by names and shapes (`detect`), but for files that `to_torch`
    wrote, which say what they are.

    Args:
      path: the file or folder.
      weights: "raw" or, of a training checkpoint, "ema".
      allow_nonfinite: takes NaN and infinity as they are.
      asked: how images are prepared (`preprocessing.FIELDS`), whatever the file says or not.
      model: a registered name; it decides where the tensors fit several models.

    Raises:
      InputError: see `torch_files.read`, `huggingface.read_description` and `from_tensors`.
    """
    file = path = Path(path)
    described: dict[str, Any] = {}
    notes: list[str] = []
    if path.is_dir():
        file = huggingface.weights_file(path)
        described, notes = huggingface.read_description(path)
    tensors, info = torch_files.read(file, weights=weights, notes=notes)
    if info is not None:
        described = {"info": info}
    elif "info" not in described:
        described["weights"] = weights
    return from_tensors(
        tensors,
        what=str(file),
        described=described,
        notes=notes,
        allow_nonfinite=allow_nonfinite,
        asked=asked,
        model=model,
    )


def from_tensors(
    tensors: Mapping[str, np.ndarray],
    *,
    what: str,
    described: Mapping[str, Any] | None = None,
    notes: Iterable[str] = (),
    allow_nonfinite: bool = False,
    asked: Mapping[str, Any] | None = None,
    model: str | None = None,
) -> Converted:
    """Turns a state dict into a model.

    Args:
      tensors: float32 arrays (and int64 BatchNorm counters) by the names of any known layout.
      what: names the source in errors and in `info.source`.
      described: what the source says, as `huggingface.read_description` returns it.
      notes: to be passed on.
      allow_nonfinite: takes NaN and infinity as they are.
      asked: as in `read`.
      model: as in `read`.

    Raises:
      InputError: unknown names or structure, a tensor too many, too few or of another shape, a
        value that is not finite, or a description that contradicts the tensors.
    """
    described, notes = dict(described or {}), list(notes)
    known: ModelInfo | None = described.pop("info", None)
    num_heads = described.pop("num_heads", None)
    model = described.pop("model", None) or model
    layout = detect.layout_of(tensors, what)
    info = known or detect.identify(tensors, layout, what=what, model=model)
    if known is None:
        notes += detect.ambiguous(info, layout, model)
    try:
        depth, found = registry.options(info)["depth"], detect.depth_of(tensors, layout)
        if depth != found:  # before hundreds of blocks are built in vain
            raise InputError(f"it says depth {depth}, the tensors are of {found} blocks")
        _, like = split_model(model_folder.build(info, registry.abstract_model))
    except (ValueError, TypeError, ArithmeticError) as error:
        if known is None:
            raise
        raise InputError(f"{what}: its description fits no model ({brief(error)})") from error
    ours = registry.options(info).get("num_heads")
    if num_heads not in (None, ours):
        raise InputError(
            f"{what}: config.json says {num_heads} attention heads, but {info.name} has {ours}"
        )
    tensors, more = buffers.taken(tensors, buffers.of(info, layout), what)
    notes += more
    variables, counts = mapping.to_variables(tensors, like, layout, what=what)
    notes += mapping.check_finite(tensors, what, allow=allow_nonfinite)
    if known is None:
        names, more = _class_names(described.pop("class_names", ()), info.num_classes)
        notes += more
        described |= {"source": f"{Path(what).name} ({layout.name} names)", "class_names": names}
    else:
        described |= {name: getattr(known, name) for name in preprocessing.FIELDS}
    prepared, more = preprocessing.settle(described, dict(asked or {}), info, what)
    notes += more
    try:
        info = dataclasses.replace(info, num_batches_tracked=counts, **described | prepared)
    except InputError as error:
        raise InputError(f"{what}: {error}") from error
    return Converted(variables, info, layout.name, tuple(notes))


def adapt(
    converted: Converted,
    *,
    model: str | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    class_names: tuple[str, ...] | None = None,
    kernel: str = "reference",
    rngs: nnx.Rngs | None = None,
) -> Converted:
    """Moves the weights to another model: other resolution, other classes, distilled or not.

    Args:
      converted: what `read` returned.
      model: the registered name of the other model; None keeps it.
      num_classes: None keeps it; other classes get newly initialised heads.
      image_size: side in pixels; None takes the named model's, or keeps it.
      class_names: one per class; None keeps them while their number stays.
      kernel: of the position embeddings' resize, see `fit.resize_pos_embed`.
      rngs: draws what is newly initialised; None: nnx.Rngs(0).

    Raises:
      InputError: the models differ in more than that, or one head of two would be new.
    """
    old = converted.info
    name = old.name if model is None else model
    size = old.image_size if name == old.name else registry.model_options(name)["image_size"]
    classes = old.num_classes if num_classes is None else num_classes
    if class_names is None:
        class_names = old.class_names if classes == old.num_classes else ()
    elif len(class_names) != classes:
        raise InputError(f"{len(class_names)} class names for {classes} classes")
    elif class_names != old.class_names and sorted(class_names) == sorted(old.class_names):
        pairs = enumerate(zip(old.class_names, class_names, strict=True))
        place, (own, given) = next((i, pair) for i, pair in pairs if len(set(pair)) > 1)
        raise InputError(
            f"the class names are the model's in another order: its class {place} is {own!r}, not "
            f"{given!r}; leave them out, or give them in its order"
        )
    target = dataclasses.replace(
        old,
        name=name,
        num_classes=classes,
        image_size=size if image_size is None else image_size,
        class_names=class_names,
    )

    def fresh() -> Variables:
        created = model_folder.build(target, registry.create_model, rngs=rngs)
        return split_model(created)[1]

    _, like = split_model(model_folder.build(target, registry.abstract_model))
    added = like.params.keys() - converted.variables.params.keys()
    if "head_dist" in added and classes == old.num_classes:
        raise InputError(
            f"{name} predicts with the mean of two heads, but the weights of {old.name} have one: "
            "the other would know nothing; convert them as they are and let training add it, with "
            f"--config.init_from=DIR --config.model.name={name}"
        )
    # Other names alone replace no head here: the user knows what the classes are.
    named = class_names if classes == old.num_classes else ()
    renamed = dataclasses.replace(old, class_names=named)
    variables, changes = fit(converted.variables, renamed, like, target, fresh=fresh, kernel=kernel)
    notes = (*converted.notes, *changes)
    return dataclasses.replace(converted, variables=variables, info=target, notes=notes)


def _class_names(names: tuple[str, ...], num_classes: int) -> tuple[tuple[str, ...], list[str]]:
    """Returns the names to keep, and notes about them."""
    if names and len(names) != num_classes:
        return (), [f"the source names {len(names)} classes, its head has {num_classes}: no names"]
    if not names and num_classes == 1000:
        return imagenet.wnids(), ["1000 classes without names: taken to be ImageNet-1k's"]
    if all(name == f"LABEL_{i}" for i, name in enumerate(names)):
        return (), []  # transformers' placeholders
    return imagenet.wnid_of_names(names) or names, []
