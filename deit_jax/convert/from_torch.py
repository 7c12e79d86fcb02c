"""From a PyTorch file to the weights and the description of one of our models."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from deit_jax import checkpoint, imagenet
from deit_jax.convert import detect, huggingface, mapping, surgery, torch_files
from deit_jax.errors import InputError
from deit_jax.models import registry
from deit_jax.models.registry import ModelInfo
from deit_jax.steps import Variables, join_model, split_model


@dataclasses.dataclass(frozen=True)
class Converted:
    """A model read from a PyTorch file.

    Attributes:
      variables: NumPy arrays, possibly views of a file in memory.
      info: the model's description; `model.json` will hold it.
      layout: in whose names the file was.
      notices: what a person should know, a line each.
    """

    variables: Variables
    info: ModelInfo
    layout: str
    notices: tuple[str, ...] = ()

    def model(self, **more: Any) -> nnx.Module:
        """The Flax model; `more` as for `registry.create_model`, for instance dtype."""
        network, like = split_model(checkpoint.build(self.info, registry.abstract_model, **more))
        del like
        return join_model(network, jax.tree.map(jax.numpy.asarray, self.variables))


def read(
    path: str | os.PathLike,
    *,
    model: str | None = None,
    weights: str = "raw",
    class_names: tuple[str, ...] | None = None,
) -> Converted:
    """Reads a `.pth`, a `.safetensors`, or a folder of transformers or timm.

    Layout and model are recognised by names and shapes (`detect`).

    Args:
      path: the file or folder.
      model: the registered name, where the structure alone does not decide.
      weights: "raw" or, of a training checkpoint, "ema".
      class_names: one name per class; by default those that the source knows, and for 1000
        classes without names the WordNet ids of ImageNet-1k.

    Raises:
      InputError: see `torch_files.read`, `detect.identify` and `from_tensors`.
    """
    path = Path(path)
    described: dict[str, Any] = {}
    notices: list[str] = []
    file = path
    if path.is_dir():
        file = huggingface.weights_file(path)
        described, notices = huggingface.read_description(path)
    content = torch_files.read(file, weights=weights)
    if content.info is not None:
        described = {"info": content.info}
    if "info" not in described:
        described = described | {"weights": weights}
    if class_names is not None:
        described = described | {"class_names": class_names}
    return from_tensors(
        content.tensors,
        what=str(file),
        model=model,
        described=described,
        notices=notices,
    )


def from_tensors(
    tensors: Mapping[str, np.ndarray],
    *,
    what: str,
    model: str | None = None,
    described: Mapping[str, Any] | None = None,
    notices: list[str] | None = None,
) -> Converted:
    """Turns a state dict into a model.

    Args:
      tensors: float32 arrays (and int64 BatchNorm counters) by the names of any known layout.
      what: names the source in errors and in `info.source`.
      model: as for `read`.
      described: what the source says, as `huggingface.read_description` returns it.
      notices: to be passed on.

    Raises:
      InputError: unknown names or structure, a tensor too many, too few or of another shape, a
        value that is not finite, or a description that contradicts the tensors.
    """
    described = dict(described or {})
    known: ModelInfo | None = described.pop("info", None)
    heads = described.pop("num_heads", None)
    name = model or (known.name if known else described.pop("name", None))
    described.pop("name", None)
    if name is not None:
        registry.model_options(name)  # an unknown name is said before anything else

    layout = detect.layout_of(tensors, what)
    found = detect.identify(tensors, layout, what=what, name=name)
    arguments = {"num_classes": found.num_classes} | found.overrides
    if found.image_size is not None:
        arguments["image_size"] = found.image_size
    if known is not None and known.name == found.name:
        arguments = {"image_size": known.image_size} | dict(known.overrides) | arguments
    abstract = registry.abstract_model(found.name, **arguments)
    _, like = split_model(abstract)
    if heads not in (None, registry.model_options(found.name).get("num_heads")):
        raise InputError(
            f"{what}: config.json says {heads} attention heads, but {found.name} has "
            f"{registry.model_options(found.name).get('num_heads')}"
        )
    variables, counts = mapping.to_variables(tensors, like, layout, what=what)
    _check_finite(tensors, what)

    # The structure is the tensors'; everything else is as the source describes it.
    info = abstract.info
    if known is not None:
        structure = {
            field: getattr(info, field)
            for field in ("name", "num_classes", "image_size", "overrides")
        }
        info = dataclasses.replace(known, **structure)
    else:
        info = dataclasses.replace(info, source=f"{Path(what).name} ({layout.name} names)")
    lines = list(notices or [])
    more: list[str] = []
    names = info.class_names
    if known is None or "class_names" in described:
        names, more = _class_names(described.pop("class_names", ()), found.num_classes, what)
    info = dataclasses.replace(info, **described, class_names=names, num_batches_tracked=counts)
    return Converted(variables, info, layout.name, (*lines, *more))


def adapt(
    converted: Converted,
    *,
    model: str | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    kernel: str = "reference",
    seed: int = 0,
) -> Converted:
    """The same weights in another model: other resolution, other classes, distilled or not.

    Args:
      converted: what `read` returned.
      model: the registered name of the other model; None keeps it.
      num_classes: None keeps it; other classes get newly initialised heads.
      image_size: side in pixels; None keeps it.
      kernel: of the position embeddings' resize, see `surgery.resize_pos_embed`.
      seed: of what is newly initialised.

    Raises:
      InputError: the models differ in more than that.
    """
    old = converted.info
    name = model or old.name
    overrides = dict(old.overrides) if name == old.name else {}
    target = dataclasses.replace(
        old,
        name=name,
        num_classes=num_classes or old.num_classes,
        image_size=image_size or old.image_size,
        overrides=tuple(sorted(overrides.items())),
        class_names=old.class_names if num_classes in (None, old.num_classes) else (),
    )
    if target == old:
        return converted
    _, like = split_model(checkpoint.build(target, registry.abstract_model))
    created = checkpoint.build(target, registry.create_model, rngs=nnx.Rngs(seed))
    _, fresh = split_model(created)
    variables, notices = surgery.fit(
        converted.variables, old, like, target, fresh=fresh, kernel=kernel
    )
    return dataclasses.replace(
        converted, variables=variables, info=target, notices=(*converted.notices, *notices)
    )


def _check_finite(tensors: Mapping[str, np.ndarray], what: str) -> None:
    for key, array in tensors.items():
        if not np.isfinite(array).all():
            count = int((~np.isfinite(array)).sum())
            raise InputError(
                f"{what}: {key} has {count} values that are not finite, of {array.size}; the "
                "training run diverged, or the file is damaged"
            )


def _class_names(
    names: tuple[str, ...], num_classes: int, what: str
) -> tuple[tuple[str, ...], list[str]]:
    """The names to keep, and notices about them."""
    if names and len(names) != num_classes:
        raise InputError(f"{what}: {len(names)} class names for {num_classes} classes")
    if not names and num_classes == 1000:
        return imagenet.wnids(), ["1000 classes without names: taken to be ImageNet-1k's"]
    if all(name == f"LABEL_{i}" for i, name in enumerate(names)):
        return (), []  # transformers' placeholders
    return imagenet.wnid_of_names(names) or names, []
