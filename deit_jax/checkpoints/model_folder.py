"""Model folders: weights as a plain Orbax checkpoint, and model.json with all else they need."""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from deit_jax import trees
from deit_jax.errors import InputError, TransientError, brief, system_reason
from deit_jax.models import registry
from deit_jax.models.network import Network, Variables, join_model, split_model
from deit_jax.parallel import hosts
from deit_jax.parallel.mesh import to_host, wait_for_all

_MODEL_FILE = "model.json"
_WEIGHTS = "weights"
_FORMAT = 1


def save_model(path: str | os.PathLike, model: nnx.Module) -> None:
    """Writes a model folder: `model.json` and the weights as a plain Orbax checkpoint.

    An existing folder is replaced only once the new one is complete.

    Args:
      path: the folder to write; its parents are created.
      model: any model of the registry; `model.info` goes to `model.json`.

    Raises:
      InputError: `path` exists and is not a model folder.
      TransientError: it cannot be written: a full disk, for example.
    """
    network, variables = split_model(model)
    write_model(path, variables, network.info)


def write_model(path: str | os.PathLike, variables: Variables, info: registry.ModelInfo) -> None:
    """`save_model` for weights that are not in a module; every process of a run calls it."""
    path = Path(path).absolute()
    first = jax.process_index() == 0
    if first and path.exists() and not (path / _MODEL_FILE).is_file():  # it is not ours to delete
        raise InputError(f"{path} exists and is no model folder; remove it or choose another path")
    fresh, old = _beside(path, "new"), _beside(path, "old")
    weights = to_host({"params": variables.params, "batch_stats": variables.batch_stats})
    try:
        if first:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(fresh / _WEIGHTS, weights)
        if first:
            text = json.dumps({"format": _FORMAT, **info.to_json()}, indent=2, ensure_ascii=False)
            (fresh / _MODEL_FILE).write_text(text + "\n", encoding="utf-8")
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
            fresh.rename(path)
            shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:  # a full disk or Ctrl-C: leave nothing half-written
        shutil.rmtree(fresh, ignore_errors=True)
        if reason := system_reason(error):
            raise TransientError(f"{path} cannot be written ({reason})") from error
        raise
    wait_for_all(f"write {path.name}")  # before any process looks for the folder
    deadline = time.monotonic() + hosts.LAG_SECONDS
    while not (path / _MODEL_FILE).is_file() and time.monotonic() < deadline:
        time.sleep(1)


def _beside(path: Path, what: str) -> Path:
    """Returns the temporary name of a folder being written or replaced; equal on every process."""
    return path.with_name(f".{path.name}.deit_jax.{what}")


def find_model(path: str | os.PathLike) -> Path | None:
    """Returns the model folder that `path` is, or that the run folder `path` holds, or None.

    Where a crash came between the two renames of a replacement, that is the complete old one.
    """
    path = Path(path).absolute()
    for folder in (path, path / "model"):
        for complete in (folder, _beside(folder, "old")):
            if (complete / _MODEL_FILE).is_file():
                return complete
    return None


def _existing_model(path: str | os.PathLike) -> Path:
    folder = find_model(path)
    if folder is None:
        raise InputError(
            f"{path} is no model folder: no {_MODEL_FILE} in it or in its model/; expected a "
            "folder written by training, by a converter or by save_model"
        )
    return folder


def read_info(path: str | os.PathLike) -> registry.ModelInfo:
    """Reads what `model.json` says, without the weights.

    Raises:
      InputError: no model folder there, or its `model.json` is damaged.
    """
    file = _existing_model(path) / _MODEL_FILE
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        version = fields.pop("format")
        info = registry.ModelInfo.from_json(fields) if version == _FORMAT else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is damaged ({error}); convert or save the model again") from error
    if info is None:
        raise InputError(f"{file} has format {version!r}, expected {_FORMAT}; update deit-jax")
    return info


def check_weights(path: str | os.PathLike, like: Variables) -> None:
    """Raises InputError unless a model folder's weights fit `like`; reads names and shapes only."""
    folder = _weights_folder(path)
    with ocp.PyTreeCheckpointer() as checkpointer:
        _check_fit(_read(folder, lambda: _metadata(checkpointer, folder)), like, folder)


def read_variables(path: str | os.PathLike, like: Variables) -> Variables:
    """Reads the weights of a model folder as NumPy arrays.

    Raises:
      InputError: the weights cannot be read, or differ from `like` in a name or a shape.
    """
    folder = _weights_folder(path)

    def restore() -> dict:
        with ocp.PyTreeCheckpointer() as checkpointer:
            arguments = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), _metadata(checkpointer, folder)
            )
            restore_args = ocp.args.PyTreeRestore(restore_args=arguments)
            return checkpointer.restore(folder, args=restore_args)

    return _check_fit(_read(folder, restore), like, folder)


def _weights_folder(path: str | os.PathLike) -> Path:
    read_info(path)
    return find_model(path) / _WEIGHTS


def _metadata(checkpointer: ocp.PyTreeCheckpointer, folder: Path) -> dict:
    metadata = checkpointer.metadata(folder).item_metadata
    if metadata is None:
        raise ValueError("files are missing or damaged")
    return metadata.tree


def _read(folder: Path, reader: Callable[[], dict]) -> dict:
    try:
        return reader()
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder} cannot be read ({brief(error)}); convert or save the model again"
        ) from error


def _check_fit(tree: dict, like: Variables, folder: Path) -> Variables:
    # Orbax writes block numbers as strings; merging those would permute the blocks (0, 1, 10, ...).
    tree = {"batch_stats": {}} | nnx.restore_int_paths(tree)
    want = {"params": like.params, "batch_stats": like.batch_stats}
    trees.check_like(tree, want, what=str(folder))
    return Variables(**trees.in_order_of(tree, want))


def read_network(
    path: str | os.PathLike, *, dtype: jax.typing.DTypeLike = np.float32
) -> tuple[Network, Variables]:
    """Returns the model that a folder's `model.json` describes, and the shapes of its weights.

    Raises:
      InputError: no model folder there, or its `model.json` is damaged.
    """
    info = read_info(path)
    try:
        return split_model(build(info, registry.abstract_model, dtype=dtype))
    except InputError as error:
        raise InputError(f"{find_model(path) / _MODEL_FILE}: {error}") from error


def load_model(path: str | os.PathLike, *, dtype: jax.typing.DTypeLike = np.float32) -> nnx.Module:
    """Loads any model folder, or the `model/` of a run folder.

    Args:
      path: the folder.
      dtype: of the matmuls; the weights stay float32.

    Returns:
      The model, its `info` as saved: `model(images)` takes [B,H,W,3], see `deit_jax.preprocess`.

    Raises:
      InputError: no model folder, a damaged one, or weights that do not fit the model.
    """
    network, like = read_network(path, dtype=dtype)
    variables = jax.tree.map(jax.numpy.asarray, read_variables(path, like))
    return join_model(network, variables)


def load_checkpoint(
    path: str | os.PathLike, *, ema: bool = False, dtype: jax.typing.DTypeLike = np.float32
) -> nnx.Module:
    """Loads the weights alone of a training checkpoint, from however many devices it was saved.

    Args:
      path: WORKDIR/checkpoints/STEP.
      ema: the EMA instead of the weights in training.
      dtype: as in `load_model`.

    Returns:
      As `load_model`.

    Raises:
      InputError: no checkpoint there, a damaged one, or one without an EMA.
    """
    folder, which = Path(path).absolute(), "ema" if ema else "model"
    try:
        meta = json.loads((folder / "meta" / "metadata").read_text(encoding="utf-8"))
        info = registry.ModelInfo.from_json(meta["model"])
        averaged = meta["ema"]
    except OSError as error:
        raise InputError(
            f"{path} is no training checkpoint ({error.strerror}); expected a folder "
            "WORKDIR/checkpoints/STEP"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({brief(error)}); choose another step") from error
    if ema and not averaged:
        raise InputError(f"{path} holds no EMA; load it with ema=False")
    info = dataclasses.replace(info, weights="ema") if ema else info
    network, like = split_model(build(info, registry.abstract_model, dtype=dtype))
    with ocp.PyTreeCheckpointer() as checkpointer:

        def restore() -> dict:
            tree = {which: _metadata(checkpointer, folder / "state")[which]}
            part = ocp.args.PyTreeRestore(
                item=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree),
                restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree),
                partial_restore=True,
            )
            return checkpointer.restore(folder / "state", args=part)[which]

        variables = _check_fit(_read(folder, restore), like, folder)
    return join_model(network, jax.tree.map(jax.numpy.asarray, variables))


def build(
    info: registry.ModelInfo, create: Callable[..., nnx.Module], **more: object
) -> nnx.Module:
    """Builds the model that `info` describes with `create_model` or `abstract_model`."""
    model = create(
        info.name,
        num_classes=info.num_classes,
        image_size=info.image_size,
        **dict(info.overrides),
        **more,
    )
    model.info = info
    return model
