"""All reading and writing of weights: training checkpoints, and self-describing model folders."""

import contextlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from deit_jax import damage, parallel, trees
from deit_jax.errors import InputError, brief, system_reason
from deit_jax.models import registry
from deit_jax.steps import Network, TrainState, Variables, join_model, split_model

_MODEL_FILE = "model.json"
_WEIGHTS = "weights"
_FORMAT = 1
_SAME_RUN = ("name", "num_classes", "image_size", "overrides")


class TrainCheckpoints:
    """The training checkpoints of one workdir: the latest few, and the best by eval top-1.

    Saves are asynchronous and atomic: a process killed while saving leaves the previous
    checkpoint as the latest. Where the latest cannot be read, the one before it counts.
    """

    def __init__(self, workdir: str, *, keep: int, set_aside: bool = True):
        """Opens WORKDIR/checkpoints, creating it where needed; every process of a run does.

        Args:
          workdir: of the run.
          keep: how many of the latest checkpoints.
          set_aside: renames what cannot be read to STEP.unreadable, so that its step can be saved
            anew and nothing is lost; for a run that will save.

        Raises:
          InputError: there are checkpoints, but none that can be read.
        """
        self._directory = Path(workdir).absolute() / "checkpoints"
        self._latest = damage.newest_readable(self._directory, set_aside=set_aside)
        self._saved = self._latest  # the last one for which a save was begun
        latest, best = (
            policy.LatestN(keep),
            policy.BestN(
                get_metric_fn=lambda metrics: metrics["top1"],
                n=1,
                keep_checkpoints_without_metrics=False,
            ),
        )
        # max_to_keep with best_fn would delete the latest checkpoint when it is not the best.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy.AnyPreservationPolicy([latest, best]),
            best_fn=lambda metrics: metrics["top1"],
            best_mode="max",
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)
        damage.check_same_steps(self._directory, list(self._manager.all_steps()))

    def latest_step(self) -> int | None:
        """The step of the newest readable checkpoint when this was opened, or None."""
        return self._latest

    def save(
        self,
        state: TrainState,
        info: registry.ModelInfo,
        *,
        step: int,
        best: dict,
        top1: float | None,
    ) -> None:
        """Saves the state of `step` in the background; does nothing if that step is saved already.

        Args:
          state: on the devices; safe to donate to the next step at once.
          info: of the model in training.
          step: updates done.
          best: the best evaluation so far (`top1` and `step`), for the run that resumes.
          top1: of this very step, where it was evaluated.

        Raises:
          InputError: this one, or the one before, cannot be written: a full disk, for example.
        """
        meta = {"model": info.to_json(), "ema": state.ema is not None, "best": best}
        with self._saving():
            self._manager.wait_until_finished()
            self._saved = step
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    meta=ocp.args.JsonSave(meta),
                ),
                metrics=None if top1 is None else {"top1": top1},
            )

    def check(self, info: registry.ModelInfo, *, ema: bool) -> None:
        """Raises InputError unless the latest checkpoint, if any, is of this model.

        Args:
          info: of the model that the config asks for.
          ema: whether the config keeps a moving average.
        """
        step = self.latest_step()
        if step is None:
            return
        where = self._directory / str(step)
        saved, wanted = (
            self._restore(step, meta=ocp.args.JsonRestore())["meta"],
            info.to_json(),
        )
        for field in _SAME_RUN:
            if saved["model"].get(field) != wanted[field]:
                raise InputError(
                    f"{where} holds a model with {field} {saved['model'].get(field)!r}, but the "
                    f"config asks for {wanted[field]!r}; choose another --workdir, or the config "
                    "that the run was started with"
                )
        if saved["ema"] != ema:
            raise InputError(
                f"{where} was saved {'with' if saved['ema'] else 'without'} a moving average, but "
                "config.train.ema_decay asks for the opposite; keep the setting of the first run"
            )

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict]:
        """Reads the latest checkpoint into the shapes and shardings of `abstract`.

        Returns:
          The state, and what was passed as `best` when it was saved.

        Raises:
          InputError: the checkpoint is damaged, or of another optimiser.
        """
        step = self.latest_step()
        items = {"state": ocp.args.StandardRestore(abstract), "meta": ocp.args.JsonRestore()}
        try:
            restored = self._restore(step, **items)
            # Orbax lets parameters that had no moments, being frozen, pass for ones that have.
            if jax.tree.structure(restored["state"]) != jax.tree.structure(abstract):
                raise ValueError("moments of other parameters, see optimizer.trainable")
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"{self._directory / str(step)} cannot be restored ({brief(error)}); keep the "
                "optimizer settings that the run was started with, or remove this checkpoint"
            ) from error
        return restored["state"], restored["meta"]["best"]

    def _restore(self, step: int, **items: ocp.args.CheckpointArgs) -> ocp.args.Composite:
        return self._manager.restore(step, args=ocp.args.Composite(**items))

    def close(self) -> None:
        """Waits for saves in progress; raises InputError as `save`."""
        with self._saving():
            self._manager.close()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """One line for a disk that is full or has failed, which is noticed in a later call."""
        try:
            yield
        except Exception as error:
            reason = system_reason(error)
            if reason is None:
                raise
            kept = [int(path.name) for path in self._directory.glob("*") if path.name.isdigit()]
            last = f"the last good state is that of step {max(kept)}" if kept else "none was saved"
            raise InputError(
                f"{self._directory / str(self._saved)} cannot be saved ({reason}); {last}; mend "
                "that and run the same command to go on"
            ) from error


def quiet_orbax() -> None:
    """Keeps Orbax from printing what is as it should be, and pages about a save that fails.

    That raises, too.

    For a program, at its start: it changes what the whole process logs.
    """

    def wanted(record: logging.LogRecord) -> bool:
        ours = "orbax" in record.pathname
        # Most checkpoints are saved without an evaluation.
        return not ours or (record.levelno < logging.ERROR and "did not provide" not in record.msg)

    def unraisable(failed: object) -> None:
        # What tensorstore has to say to Orbax's event loop, which has ended with the first error.
        if str(failed.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(failed)

    logging.getLogger("absl").addFilter(wanted)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = unraisable


def save_model(path: str | os.PathLike, model: nnx.Module) -> None:
    """Writes a model folder: `model.json` and the weights as a plain Orbax checkpoint.

    An existing folder is replaced only once the new one is complete.

    Args:
      path: the folder to write; its parents are created.
      model: any model of the registry; `model.info` goes to `model.json`.

    Raises:
      InputError: `path` exists and is something else than a model folder, or cannot be written.
    """
    network, variables = split_model(model)
    write_model(path, variables, network.info)


def write_model(path: str | os.PathLike, variables: Variables, info: registry.ModelInfo) -> None:
    """`save_model` for weights that are not in a module; every process of a run calls it."""
    path = Path(path).absolute()
    if path.exists() and not (path / _MODEL_FILE).is_file():  # never delete what we did not write
        raise InputError(f"{path} exists and is no model folder; remove it or choose another path")
    fresh, old = _beside(path, "new"), _beside(path, "old")
    weights = parallel.to_host({"params": variables.params, "batch_stats": variables.batch_stats})
    try:
        if jax.process_index() == 0:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(fresh / _WEIGHTS, weights)
        if jax.process_index() == 0:
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
            raise InputError(f"{path} cannot be written ({reason})") from error
        raise
    parallel.wait_for_all(f"write {path.name}")  # before any process looks for the folder


def _beside(path: Path, what: str) -> Path:
    """A name for what is on its way in or out: the same on every process, and nobody else's."""
    return path.with_name(f".{path.name}.deit_jax.{what}")


def find_model(path: str | os.PathLike) -> Path | None:
    """The model folder that `path` is, or that the run folder `path` holds; None without one.

    A folder that a crash left half-way through its replacement is put back first.
    """
    path = Path(path).absolute()
    for folder in (path, path / "model"):
        old = _beside(folder, "old")
        if not folder.exists() and (old / _MODEL_FILE).is_file():
            old.rename(folder)
        if (folder / _MODEL_FILE).is_file():
            return folder
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
    """The model that a folder's `model.json` describes, with the shapes of its weights.

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
      dtype: of the matrix products; the weights stay float32.

    Returns:
      The model, its `info` as saved: `model(images)` takes [B,H,W,3], see `deit_jax.preprocess`.

    Raises:
      InputError: no model folder, a damaged one, or weights that do not fit the model.
    """
    network, like = read_network(path, dtype=dtype)
    variables = jax.tree.map(jax.numpy.asarray, read_variables(path, like))
    return join_model(network, variables)


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
