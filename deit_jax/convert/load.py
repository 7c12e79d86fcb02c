"""One line from a name to a model: a folder, a PyTorch file, a URL or a repository of the hub."""

import contextlib
import dataclasses
import hashlib
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from deit_jax import storage
from deit_jax.checkpoints import model_folder
from deit_jax.console import log_error
from deit_jax.convert import download, from_torch, huggingface, shards
from deit_jax.convert.from_torch import Converted
from deit_jax.errors import InputError, TransientError, brief
from deit_jax.models import figures, registry


def load_model(
    source: str | os.PathLike,
    *,
    model: str | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    class_names: Sequence[str] | None = None,
    pos_embed: str = "reference",
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs | None = None,
    refresh: bool = False,
    **options: Any,
) -> nnx.Module:
    """Loads a model from wherever its weights are.

    What comes from the hub or a URL is converted once and kept, with its revision in `info.source`,
    in $DEIT_JAX_CACHE, else `deit_jax` in the user's cache folder; from then on nothing is asked of
    the network. Weights that are to fit another model are fitted as `deit-jax convert` does. What
    was assumed, resized, dropped or newly initialised is printed to stderr.

    Args:
      source: a model folder, the run folder that holds one, a `.pth` or `.safetensors`, a folder of
        transformers or timm, each also under `gs://`; an `https://` URL of a file; or
        `hf:OWNER/NAME`, perhaps with `@REVISION`, of the Hugging Face hub.
      model: a registered name, if not the file's.
      num_classes: if not the file's: new heads; 0: none, for features.
      image_size: side in pixels, if not the model's.
      class_names: one for each class.
      pos_embed: how position embeddings are resized: "reference" or "timm".
      dtype: of the matmuls; the weights stay float32.
      rngs: draws what is new; None: nnx.Rngs(0).
      refresh: asks the network again for what is kept.
      options: further ones of `create_model` that change no weights, such as attention or
        drop_path_rate.

    Returns:
      The model; `model(images)` takes [B,H,W,3], see `deit_jax.preprocess`.

    Raises:
      InputError: no weights there, damaged or hostile ones, or weights that do not fit.
      TransientError: no answer from the network, or no room on the disk.
    """
    for option in options:
        if option not in ("drop_path_rate", *registry.TRAINING_OPTIONS):
            known = ", ".join(("drop_path_rate", *registry.TRAINING_OPTIONS))
            raise InputError(f"weights have their {option}: only {known} are free to choose")
    converted = _read(source, model, refresh)
    wanted = {"model": model, "num_classes": num_classes, "image_size": image_size}
    wanted["class_names"] = None if class_names is None else tuple(class_names)
    if any(value is not None for value in wanted.values()):
        known = dataclasses.replace(converted, notes=())
        converted = from_torch.adapt(known, **wanted, kernel=pos_embed, rngs=rngs)
        _say(source, converted.notes)
    return converted.model(dtype=dtype, **options)


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs | None = None,
    **options: Any,
) -> nnx.Module:
    """Creates a model, randomly initialised or with its published weights.

    `save_model` and `load_model` keep all of it but `dtype`, `attention`, `dynamic_image_size` and
    what only training uses: drop rates and `remat`.

    Args:
      name: one of `list_models()`.
      pretrained: loads the weights that `list_models(details=True)` names, by `load_model`.
      num_classes: of each head; None: 1000, or the published ones; 0 for none: the model then
        returns its features.
      image_size: side of the input in pixels, or (height, width); None takes the one in the name.
      dtype: of the matmuls, float32 or bfloat16; parameters and logits are float32.
      rngs: draws the parameters; None: nnx.Rngs(0), so the same at every call.
      options: drop_path_rate, of the last block or (DeiT III) of all; further arguments of the
        model's class, such as VisionTransformer or RegNetY.

    Returns:
      The module; `model.info` is its ModelInfo.

    Raises:
      InputError: unknown name or option, values that do not fit, or no published weights.
      TransientError: as `load_model`.
    """
    fixed = {"image_size": image_size, "dtype": dtype, "rngs": rngs, **options}
    if not pretrained:
        classes = 1000 if num_classes is None else num_classes
        return registry.create_model(name, num_classes=classes, **fixed)
    row = figures.row(name, registry.model_options(name)["image_size"])
    if not row.weights:
        raise InputError(
            f"pretrained is True, but timm has no weights of {name}; give a file or URL of them to "
            "load_model, or choose a model that list_models(details=True) has weights of"
        )
    log_error(f"{name}: weights {row.weights}, licence {row.licence}")
    return load_model(row.weights, model=name, num_classes=num_classes, **fixed)


def _read(source: str | os.PathLike, model: str | None, refresh: bool) -> Converted:
    text = os.fspath(source)
    scheme = re.match(r"hf:|([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if isinstance(source, str) and scheme and scheme[1] != "gs":
        return _published(source, model, refresh)
    path = storage.path_of(text)
    if folder := model_folder.find_model(path):
        return _kept(folder)
    if text in registry.names_of():
        where = figures.weights_of(text)
        raise InputError(
            f"{text} is a model's name, not a file or folder; its published weights are {where}"
            if where
            else f"{text} is a model's name, of which timm has no published weights; name a model "
            "folder, or a file or URL of weights"
        )
    if path.is_dir() and not any(
        (path / name).is_file() for name in (*huggingface.WEIGHTS, *shards.INDICES)
    ):
        model_folder.read_info(path)  # says what a folder has to hold
    return _converted(download.fetch(text if not path.exists() else str(path)), source, model)


def _kept(folder: storage.Path) -> Converted:
    network, like = model_folder.read_network(folder)
    return Converted(model_folder.read_variables(folder, like), network.info, "deit-jax")


def _converted(file: Path, source: str | os.PathLike, model: str | None) -> Converted:
    converted = from_torch.read(file, model=model)
    _say(source, [f"{converted.info.name}, {converted.layout} names", *converted.notes])
    return converted


def _published(source: str, model: str | None, refresh: bool) -> Converted:
    """Converts what `source` names, or reads what was kept of it."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", source.rpartition("/")[2])[-64:].lstrip(".")
    digest = hashlib.sha256(f"{source} {model}".encode()).hexdigest()[:12]
    folder = download.cache_folder(None) / "models" / f"{name}-{digest}"
    if not refresh and model_folder.find_model(folder):
        try:
            kept = _kept(folder)
            _say(source, [f"from {folder}, {kept.info.source}"])
            return kept
        except InputError as error:
            _say(source, [f"{error}: converting again"])
    with contextlib.ExitStack() as stack:
        cache = None
        if refresh and not source.startswith("hf:"):  # past what has been downloaded before
            cache = stack.enter_context(tempfile.TemporaryDirectory())
        file = download.fetch(source, cache=cache)
        converted = _converted(file, source, model)
        revision = f"revision {file.name}" if file.is_dir() else f"SHA-256 {download.sha256(file)}"
        said = f"{source}, {revision} ({converted.layout} names)"
        info = dataclasses.replace(converted.info, source=said)
        converted = dataclasses.replace(converted, info=info)
        try:
            _keep(converted, folder)
        except (InputError, TransientError, OSError) as error:
            _say(source, [f"not kept, so the next start converts it again ({brief(error)})"])
    return converted


def _keep(converted: Converted, folder: Path) -> None:
    """Writes a model folder, whole or not at all, whoever else writes it."""
    if jax.process_count() > 1:  # each for itself: what Orbax writes is written by all together
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
        fresh, old = Path(beside, "new"), Path(beside, "old")
        model_folder.write_model(fresh, converted.variables, converted.info)
        if folder.exists():
            folder.rename(old)
        try:
            fresh.rename(folder)
        except OSError:
            if not folder.exists():
                old.rename(folder)
                raise


def _say(source: str | os.PathLike, notes: Sequence[str]) -> None:
    for note in notes:
        log_error(f"{os.fspath(source)}: {note}")
