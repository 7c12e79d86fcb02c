"""Training checkpoints: saved and restored as the loop goes. Model folders are in model_folder."""

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from deit_jax.checkpoints import recovery
from deit_jax.errors import InputError, TransientError, brief, system_reason
from deit_jax.models import registry
from deit_jax.parallel import hosts

_SAME_RUN = ("name", "num_classes", "image_size", "overrides")
_SAVE_SECONDS = 3600  # for a large state on a slow disk; processes that fail are noticed at once


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
        self._latest = recovery.newest_readable(self._directory, set_aside=set_aside)
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
            async_options=ocp.options.AsyncOptions(
                timeout_secs=_SAVE_SECONDS, barrier_sync_fn=self._barrier
            ),
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)
        recovery.check_same_steps(self._directory, list(self._manager.all_steps()))

    def latest_step(self) -> int | None:
        """The step of the newest readable checkpoint when this was opened, or None."""
        return self._latest

    def save(
        self,
        state: Any,
        info: registry.ModelInfo,
        *,
        step: int,
        best: dict,
        top1: float | None,
    ) -> None:
        """Saves the state of `step` in the background; does nothing if that step is saved already.

        Args:
          state: a tree of arrays on the devices with the attribute `ema`; safe to donate to the
            next step at once.
          info: of the model in training.
          step: updates done.
          best: the best evaluation so far (`top1` and `step`), for the run that resumes.
          top1: of this very step, where it was evaluated.

        Raises:
          TryAgain: this one, or the one before, cannot be written: a full disk, for example. In a
            run of several processes all of them end as soon as one finds that out.
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

    def restore(self, abstract: Any) -> tuple[Any, dict]:
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
        """Waits for saves in progress; raises TryAgain as `save`."""
        with self._saving():
            self._manager.close()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """One line for a disk that is full or has failed, which is noticed in a later call."""
        try:
            yield
        except Exception as error:
            line = self._line(error)
            if line is None:
                raise
            raise TransientError(line) from error

    def _line(self, error: BaseException) -> str | None:
        reason = system_reason(error)
        if reason is None:
            return None
        kept = [int(path.name) for path in self._directory.glob("*") if path.name.isdigit()]
        last = f"the last good state is that of step {max(kept)}" if kept else "none was saved"
        return (
            f"{self._directory / str(self._saved)} cannot be saved ({reason}); {last}; mend that "
            "and run the same command to go on"
        )

    def _barrier(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's own barrier between processes, but in a background save that has failed here.

        There Orbax would wait for the others before it reports the failure, and they would wait for
        its share: this one ends them all.
        """
        failure = sys.exception()
        if failure is None or threading.current_thread() is threading.main_thread():
            ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)
            return
        # Orbax's own time-out: another process died, which JAX notices. The system's has a number.
        died = isinstance(failure, TimeoutError) and failure.errno is None
        if hosts.connected() and not died:
            line = self._line(failure)
            if line is None:
                hosts.crash(failure)
            hosts.fail(line, status=TransientError.exit_status)
        raise failure


def silence_orbax() -> None:
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
