"""Training checkpoints: saved and restored as the loop goes. Model folders are in model_folder."""

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from deit_jax import couplings, folders, storage, trees
from deit_jax.checkpoints import checksums, recovery
from deit_jax.console import log
from deit_jax.errors import InputError, TransientError, system_reason
from deit_jax.models import registry
from deit_jax.parallel import hosts
from deit_jax.parallel.lease import Lease

_SAME_RUN = ("name", "num_classes", "image_size", "overrides")
_SAVE_SECONDS = 3600  # for a large state on a slow disk
_MAX_LISTED = 3


class TrainCheckpoints:
    """The training checkpoints of one workdir: the latest few, and the best by eval top-1.

    Saves are asynchronous and atomic: a process killed while saving leaves the previous
    checkpoint as the latest. Where the latest cannot be read, the one before it counts.

    Attributes:
      found: step and facts of the checkpoint that `check` has looked at; the facts are {} in one of
        an earlier version.
    """

    def __init__(
        self,
        workdir: str,
        *,
        keep: int,
        set_aside: bool = True,
        facts: dict | None = None,
        hold: Lease | None = None,
    ):
        """Looks into WORKDIR/checkpoints, which may not be there; every process of a run does.

        Args:
          workdir: of the run.
          keep: how many of the latest checkpoints.
          set_aside: renames what cannot be read to STEP.unreadable; for a run that will save.
          facts: of the run, as JSON has them; saved with each checkpoint.
          hold: the lease of the workdir; nothing is saved once it is lost.
        """
        self._facts, self._hold = facts or {}, hold
        self.found: tuple[int, dict] | None = None
        self._directory = storage.path_of(workdir, "checkpoints")
        self._kept, self._set_aside = _NewestAndBest(keep), set_aside
        self._steps = recovery.list_steps(self._directory)
        self._saved = None  # the last step for which a save was begun
        self._failure = None  # of a save in the background

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """Orbax's."""
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._kept,
            lightweight_initialize=True,  # of older checkpoints only the step counts
            async_options=ocp.options.AsyncOptions(
                timeout_secs=_SAVE_SECONDS,
                barrier_sync_fn=couplings.orbax_barrier(self._save_failed),
                # Where a folder could not be made, its writers would wait for it, and Python's end
                # for them, up to the timeout.
                create_directories_asynchronously=False,
            ),
        )
        return ocp.CheckpointManager(self._directory, options=options)

    def latest_step(self) -> int | None:
        """Returns the newest step when this was opened, or None; it may turn out unreadable."""
        return max(self._steps, default=None)

    def check(self, info: registry.ModelInfo, *, ema: bool) -> None:
        """Raises InputError unless the latest checkpoint, if any, is of this model.

        Args:
          info: of the model that the config asks for.
          ema: whether the config keeps an EMA.
        """
        for step in reversed(self._steps):
            folder = self._directory / str(step)
            try:
                saved = _read_meta(folder)
                _ = {**saved["model"]}, saved["ema"]
            except Exception:  # `restore` says why, and goes on from the one before
                continue
            _check_model(folder, saved, info, ema)
            self.found = step, saved.get("run", {})
            return

    def restore(self, abstract: Any) -> tuple[Any, dict, int] | None:
        """Reads the newest checkpoint that can be read; every process of a run does.

        Args:
          abstract: the state's shapes and shardings.

        Returns:
          The state, what was passed as `best` when it was saved, and its step; None without any
          checkpoint.

        Raises:
          InputError: no checkpoint can be read, or it is of another optimiser.
          TransientError: the disk does not answer, or a permission is missing.
        """

        def read(folder: storage.Path) -> tuple[tuple[Any, dict], checksums.Parts]:
            meta, handler = _read_meta(folder), ocp.StandardCheckpointHandler()
            _check_names(folder, handler.metadata(folder / "state").tree, abstract)
            # The manager would wait for processes that have met an error.
            restore_args = ocp.args.StandardRestore(abstract)
            state = handler.restore(folder / "state", args=restore_args)
            _ = meta["best"]
            return (state, meta), checksums.part(state)

        def check(content: tuple[Any, dict], parts: list[checksums.Parts]) -> None:
            _, meta = content
            if "checksums" in meta:  # those of earlier versions have none
                checksums.check(meta["checksums"], parts)

        found = recovery.newest_readable(self._directory, read, check, set_aside=self._set_aside)
        if found is None:
            return None
        step, (state, meta) = found
        if "checksums" not in meta:
            note = f"note: step {step} is of an earlier version, without checksums to compare"
            log(note, on=hosts.is_first())
        return state, meta["best"], step

    def save(self, state: Any, info: registry.ModelInfo, *, step: int, best: dict) -> None:
        """Saves the state of `step` in the background; does nothing if that step is saved already.

        Args:
          state: a tree of arrays on the devices with the attribute `ema`; safe to donate to the
            next step at once.
          info: of the model in training.
          step: updates done.
          best: the best evaluation so far (`top1` and `step`), for the run that resumes; the
            checkpoint of that step is kept.

        Raises:
          TransientError: this one, or the one before, cannot be written: a full disk, for example.
          InputError: the workdir is gone.
        """
        if step == self._saved:
            return
        meta = {"model": info.to_json(), "ema": state.ema is not None, "best": best}
        meta["run"] = self._facts
        with self._saving():
            if self._hold is not None:
                self._hold.check()
            self._manager.wait_until_finished()
            meta["checksums"] = checksums.of(state, f"step {step}")
            self._saved, self._kept.best = step, best["step"]
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    meta=ocp.args.JsonSave(checksums.seal(meta)),
                ),
            )

    def check_saves(self) -> None:
        """Raises as `save` where this process could not write its share; call it every step.

        The other processes wait for that share, and would train on until they save again.
        """
        with self._saving():
            if self._failure is not None:
                raise self._failure

    def close(self) -> None:
        """Waits for saves in progress; raises as `save`."""
        try:
            if self._saved is not None:
                with self._saving():
                    self._manager.close()
        finally:
            if self._hold is not None and self._hold.lost:
                self._remove_remnant()

    def _remove_remnant(self) -> None:
        """Removes what a save under way has made anew of a workdir that was deleted or moved."""
        wait = 0.05
        while wait < 2 and self._is_remnant():
            with contextlib.suppress(OSError):  # the save's writers may make more meanwhile
                storage.remove_folder(self._directory)
                self._directory.parent.rmdir()
            time.sleep(wait)
            wait *= 2

    def _is_remnant(self) -> bool:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            only = [path.name for path in self._directory.parent.iterdir()]
            steps = [path.name for path in self._directory.iterdir()]
            saved = all(name.startswith(f"{self._saved}") for name in steps)
            return only == [self._directory.name] and saved
        return False

    def _save_failed(self, error: BaseException) -> None:
        self._failure = error

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """One line for a disk that is full or has failed."""
        try:
            yield
        except Exception as error:
            if self._hold is not None:  # Orbax fails in many ways where the workdir is gone
                self._hold.check_here(now=True)
            reason = system_reason(error)
            if reason is None:
                raise
            kept = []
            with contextlib.suppress(OSError):
                kept = recovery.steps_in(self._directory)
            last = f"the last good state is that of step {max(kept)}" if kept else "none was saved"
            raise TransientError(
                f"{self._directory / str(self._saved)} cannot be saved ({reason}); {last}; mend "
                "that and run the same command to go on"
            ) from error


class _NewestAndBest(policy.PreservationPolicy):
    """Orbax's question at each save: which checkpoints stay."""

    def __init__(self, keep: int):
        self._keep = keep
        self.best = -1  # the step of the best evaluation

    def should_preserve(
        self, checkpoints: Sequence[policy.PolicyCheckpointInfo], *, context: object
    ) -> list[bool]:
        older = len(checkpoints) - self._keep
        return [n >= older or found.step == self.best for n, found in enumerate(checkpoints)]


def saved_info(workdir: str) -> registry.ModelInfo | None:
    """Returns the description of the model in the newest checkpoint whose description is whole."""
    directory, steps = storage.path_of(workdir, "checkpoints"), []
    with contextlib.suppress(OSError):  # opening the checkpoints says why
        steps = recovery.steps_in(directory)
    for step in reversed(steps):
        with contextlib.suppress(Exception):  # restoring says why, and takes the one before
            return registry.ModelInfo.from_json(_read_meta(directory / str(step))["model"])
    return None


def _read_meta(folder: storage.Path) -> dict:
    return checksums.read_sealed(folder / "meta" / "metadata")


def _check_model(folder: storage.Path, saved: dict, info: registry.ModelInfo, ema: bool) -> None:
    wanted = info.to_json()
    for field in _SAME_RUN:
        if saved["model"].get(field) != wanted[field]:
            raise InputError(
                f"{folder} holds a model with {field} {saved['model'].get(field)!r}, but the "
                f"config asks for {wanted[field]!r}; choose another --workdir, or the config "
                "that the run was started with"
            )
    names = saved["model"].get("class_names") or ()
    if other := folders.first_other(names, wanted["class_names"]):
        number, old, new = other
        raise InputError(
            f"{folder} holds a model whose class {number} is {old!r}, but in the data set it is "
            f"{new!r}; its labels would mean something else: check config.dataset"
        )
    if saved["ema"] != ema:
        raise InputError(
            f"{folder} was saved {'with' if saved['ema'] else 'without'} an EMA, but "
            "config.train.ema_decay asks for the opposite; keep the setting of the first run"
        )


def _check_names(folder: storage.Path, saved: Any, abstract: Any) -> None:
    """Raises InputError unless a checkpoint holds the arrays of `abstract`: names, types, shapes.

    Orbax would convert to another type.
    """
    found, wanted = (
        {(name, str(leaf.dtype), tuple(leaf.shape)) for name, leaf in trees.flat(tree).items()}
        for tree in (saved, abstract)
    )
    if differing := sorted(found ^ wanted):
        listed = ", ".join(
            f"{name} {kind}{list(shape)}" for name, kind, shape in differing[:_MAX_LISTED]
        )
        raise InputError(
            f"{folder} holds another optimizer's state: {len(differing)} arrays differ, such as "
            f"{listed}; keep the optimizer settings that the run was started with"
        )
