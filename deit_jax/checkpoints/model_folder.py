"""Model folders: weights as a plain Orbax checkpoint, and model.json with all else they need."""

import contextlib
import dataclasses
import json
import os
import re
import time
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from deit_jax import couplings, storage, trees
from deit_jax.checkpoints import checksums
from deit_jax.errors import InputError, TransientError, brief, system_reason
from deit_jax.models import figures, registry
from deit_jax.models.network import Network, Variables, join_model, split_model
from deit_jax.parallel import hosts
from deit_jax.parallel.mesh import to_host, wait_for_all

_MODEL_FILE = "model.json"
_WEIGHTS, _OTHER_WEIGHTS = "weights", "weights_2"  # in turns, where a folder is written again
_BEGUN = ".writing"  # in a folder that is being written
_FORMAT = 2  # 1 had no checksums


def save_model(path: str | os.PathLike, model: nnx.Module, *, replace: bool = False) -> None:
    """Writes a model folder: `model.json` and the weights as a plain Orbax checkpoint.

    Args:
      path: the folder to write; its parents are created.
      model: any model of the registry; `model.info` goes to `model.json`.
      replace: a model folder that is there is replaced, once the new one is complete.

    Raises:
      InputError: `path` holds a model and `replace` is False, or exists and is no model folder;
        or `load_model` could not read the weights, which are not those that `model.info` describes.
      TransientError: it cannot be written: a full disk, for example.
    """
    if not isinstance(getattr(model, "info", None), registry.ModelInfo):
        raise InputError(
            f"a {type(model).__name__} without `info` cannot be saved; build models by create_model"
        )
    network, variables = split_model(model)
    _, like = split_model(build(network.info, registry.abstract_model))
    trees.check_like(variables, like, "the weights to be saved")
    if not replace and (storage.path_of(path) / _MODEL_FILE).is_file():
        raise InputError(
            f"{path} holds a model already; name another folder, or replace that by replace=True"
        )
    write_model(path, variables, network.info)


def write_model(path: str | os.PathLike, variables: Variables, info: registry.ModelInfo) -> None:
    """`save_model` for weights that are not in a module; every process of a run calls it."""
    path = storage.path_of(path)
    first = jax.process_index() == 0
    if first:
        check_place(path)
    # Never over the weights in use: the new ones count from the moment that model.json names them.
    used = hosts.gather(f"the writing of {path}", _weights_name(path))[0]
    name = _OTHER_WEIGHTS if used == _WEIGHTS else _WEIGHTS
    fields = {"format": _FORMAT, "folder": name, **info.to_json()}
    fields = checksums.seal(fields | {"checksums": checksums.of(variables, str(path))})
    text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
    weights = to_host({"params": variables.params, "batch_stats": variables.batch_stats})
    try:
        if first:
            storage.remove_folder(path / name)
            path.mkdir(parents=True, exist_ok=True)
            (path / _BEGUN).write_text("")
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(path / name, weights)
        if first:
            storage.replace_text(path / _MODEL_FILE, text)
            storage.remove_folder(path / (_WEIGHTS if name == _OTHER_WEIGHTS else _OTHER_WEIGHTS))
            (path / _BEGUN).unlink()
    except BaseException as error:  # a full disk or Ctrl-C: leave nothing half-written
        # Once they are named the new weights count, and the old may be gone.
        if first and _weights_name(path) != name:
            with contextlib.suppress(Exception):  # what has failed may fail again, and is reported
                storage.remove_folder(path / name if used else path)
        if reason := system_reason(error):
            raise TransientError(f"{path} cannot be written ({reason})") from error
        raise
    wait_for_all(f"write {path.name}")  # before any process looks for the folder
    deadline = time.monotonic() + hosts.LAG_SECONDS
    while _weights_name(path) != name and time.monotonic() < deadline:
        time.sleep(1)


def check_place(path: storage.Path) -> None:
    """Raises InputError where `path` is something else than a model folder, whole or begun."""
    storage.check_name(path)
    if path.exists() and not any((path / name).is_file() for name in (_MODEL_FILE, _BEGUN)):
        raise InputError(
            f"{path} exists and is not a model folder; remove it or choose another path"
        )


def _weights_name(path: storage.Path) -> str:
    """Returns the name of the weights that `model.json` speaks of; "" without one."""
    try:
        fields = storage.parse_json((path / _MODEL_FILE).read_bytes())
        return str(fields.get("folder", _WEIGHTS))
    except (OSError, ValueError, AttributeError):
        return ""


def find_model(path: str | os.PathLike) -> storage.Path | None:
    """Returns the model folder that `path` is, or that the run folder `path` holds, or None."""
    for folder in (storage.path_of(path), storage.path_of(path, "model")):
        if (folder / _MODEL_FILE).is_file():
            return folder
    return None


def _existing_model(path: str | os.PathLike) -> storage.Path:
    text = os.fspath(path)
    address = re.match("hf:|https?://", text)
    if not address and (folder := find_model(path)):
        return folder
    if source := text if address else _to_convert(text):
        raise InputError(
            f"{path} is not a model folder; convert it first: deit-jax convert --src {source} "
            "--dst FOLDER"
        )
    if all(storage.path_of(path, part).is_dir() for part in ("state", "meta")):
        run = storage.path_of(path).parent.parent
        raise InputError(
            f"{path} is a training checkpoint; name the run, {run}, or read it by "
            "deit_jax.load_checkpoint"
        )
    raise InputError(
        f"{path} is not a model folder: no {_MODEL_FILE} in it or in its model/; expected a "
        "folder written by training, by a converter or by save_model"
    )


def _to_convert(text: str) -> str | None:
    """Returns what `deit-jax convert --src` takes for a file, or for timm's name of a model."""
    path = storage.path_of(text)
    if path.exists():
        return text if path.is_file() else None
    name = text.removeprefix("timm/").partition(".")[0]  # without the tag of the weights
    return figures.weights_of(name) or None if name in figures.FIGURES else None


def read_info(path: str | os.PathLike) -> registry.ModelInfo:
    """Reads what `model.json` says, without the weights.

    Raises:
      InputError: not a model folder, or its `model.json` is damaged.
    """
    return _read_description(path)[0]


def _read_description(
    path: str | os.PathLike,
) -> tuple[registry.ModelInfo, storage.Path, dict[str, str] | None]:
    """Returns the model's description, where its weights are, and their checksums."""
    file = _existing_model(path) / _MODEL_FILE
    hint = "convert or save the model again"
    try:
        sealed = storage.parse_json(file.read_bytes())
        fields = dict(sealed)
        version, _ = fields.pop("format"), fields.pop("digest", None)
        folder, kept = fields.pop("folder", _WEIGHTS), fields.pop("checksums", None)
        if version in (1, _FORMAT):
            info = registry.ModelInfo.from_json(fields)
            if folder not in (_WEIGHTS, _OTHER_WEIGHTS):
                raise ValueError("its folder is none of ours")
            if version == _FORMAT and not isinstance(kept, dict):
                raise ValueError("it has no checksums")
            hint += ', or remove "digest" from it if you have changed it by hand'
            checksums.unseal(sealed)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is damaged ({error}); {hint}") from error
    if version not in (1, _FORMAT):
        raise InputError(f"{file} has format {version!r}, expected {_FORMAT}; update deit-jax")
    return info, file.parent / folder, kept


def check_weights(path: str | os.PathLike, like: Variables) -> None:
    """Raises InputError unless a model folder's weights fit `like`; reads names and shapes only."""
    _, folder, _ = _read_description(path)
    with ocp.PyTreeCheckpointer() as checkpointer:
        _check_fit(_read(folder, lambda: _metadata(checkpointer, folder)), like, folder)


def read_variables(path: str | os.PathLike, like: Variables) -> Variables:
    """Reads the weights of a model folder as NumPy arrays.

    Raises:
      InputError: the weights cannot be read, differ from `like` in a name or a shape, or have
        changed since they were written.
    """
    _, folder, kept = _read_description(path)

    def restore() -> dict:
        with ocp.PyTreeCheckpointer() as checkpointer:
            arguments = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), _metadata(checkpointer, folder)
            )
            restore_args = ocp.args.PyTreeRestore(restore_args=arguments)
            return checkpointer.restore(folder, args=restore_args)

    variables = _check_fit(_read(folder, restore), like, folder)
    _check_sums(kept, variables, folder)
    return variables


def _check_sums(kept: dict[str, str] | None, tree: object, folder: storage.Path) -> None:
    """Raises InputError where arrays have changed since they were written."""
    if kept is None:  # of an earlier version
        return
    try:
        checksums.check(kept, [checksums.part(tree)])
    except ValueError as error:
        raise InputError(
            f"{folder} is damaged ({error}); take another copy of it, or save it again"
        ) from error


def _metadata(checkpointer: ocp.PyTreeCheckpointer, folder: storage.Path) -> dict:
    metadata = checkpointer.metadata(folder).item_metadata
    if metadata is None:
        raise ValueError("files are missing or damaged")
    return metadata.tree


def _read(folder: storage.Path, reader: Callable[[], dict]) -> dict:
    try:
        return reader()
    except Exception as error:
        if not couplings.is_unreadable(error):
            raise
        raise InputError(
            f"{folder} cannot be read ({brief(error)}); convert or save the model again"
        ) from error


def _check_fit(tree: dict, like: Variables, folder: storage.Path) -> Variables:
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
      InputError: not a model folder, or its `model.json` is damaged.
    """
    info = read_info(path)
    _check_depth(path, info)
    try:
        return split_model(build(info, registry.abstract_model, dtype=dtype))
    except InputError as error:
        raise InputError(f"{find_model(path) / _MODEL_FILE}: {error}") from error


def _check_depth(path: str | os.PathLike, info: registry.ModelInfo) -> None:
    """Compares an unusual depth with the weights, before hundreds of blocks are built in vain."""
    depth = dict(info.overrides).get("depth")
    if depth is None:
        return
    model = find_model(path)
    folder = model / _weights_name(model)
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = _read(folder, lambda: _metadata(checkpointer, folder))
    params = tree.get("params", {})
    stages = [blocks for name, blocks in params.items() if re.fullmatch(r"blocks|s\d+", name)]
    found = sum(len(blocks) for blocks in stages)
    if depth != found:
        raise InputError(
            f"{model / _MODEL_FILE} says depth {depth}, but the weights have {found} blocks; "
            "convert or save the model again"
        )


def load_model(path: str | os.PathLike, *, dtype: jax.typing.DTypeLike = np.float32) -> nnx.Module:
    """Loads any model folder, or the `model/` of a run folder.

    Args:
      path: the folder.
      dtype: of the matmuls; the weights stay float32.

    Returns:
      The model, its `info` as saved: `model(images)` takes [B,H,W,3], see `deit_jax.preprocess`.

    Raises:
      InputError: not a model folder, a damaged one, or weights that do not fit the model.
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
    folder, which = storage.path_of(path), "ema" if ema else "model"
    try:
        meta = checksums.read_sealed(folder / "meta" / "metadata")
        info = registry.ModelInfo.from_json(meta["model"])
        averaged = meta["ema"]
    except OSError as error:
        raise InputError(
            f"{path} is not a training checkpoint ({error.strerror}); expected a folder "
            "WORKDIR/checkpoints/STEP"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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
    _check_sums(meta.get("checksums"), {which: variables}, folder)
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
