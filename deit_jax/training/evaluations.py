"""The evaluations of a training run: recorded, the best model kept, and done again after a stop."""

import json

from deit_jax.checkpoints import model_folder
from deit_jax.console import log
from deit_jax.parallel import hosts
from deit_jax.parallel.lease import Lease
from deit_jax.parallel.preemption import StopSignal
from deit_jax.training import metrics
from deit_jax.training.evaluate import evaluator, images_digest
from deit_jax.training.run import Run
from deit_jax.training.showcase import Showcase
from deit_jax.training.state import TrainState


class Evaluations:
    """Evaluates a run where it is due.

    Nothing of it is in the checkpoint of the same step, which is saved before. A run that resumes
    there does it again, with the same result, unless it is in metrics.jsonl.

    Attributes:
      best: the best evaluation so far: `top1` and `step`.
    """

    def __init__(
        self,
        run: Run,
        writer: metrics.MetricWriter,
        stop: StopSignal,
        best: dict,
        hold: Lease,
        showcase: Showcase,
    ):
        """Evaluates nothing yet.

        Args:
          run: the checked run.
          writer: of its metrics.
          stop: an evaluation under way is left between two batches.
          best: that of the checkpoint.
          hold: the lease of the workdir.
          showcase: draws images of each evaluation.
        """
        self.best, self._hold, self._showcase = best, hold, showcase
        self._run, self._writer, self._stop = run, writer, stop
        self._evaluate = evaluator(run, stop)
        self._data = images_digest(run, run.network.info, run.config.input.image_size)

    def due(self, step: int) -> bool:
        """Returns whether to evaluate after a step; always after the last one."""
        every, last = self._run.plan.eval_every, self._run.plan.total_steps
        return step >= last or (step > 0 and every > 0 and step % every == 0)

    def after(self, step: int, state: TrainState) -> dict[str, float]:
        """Returns the results of the state of a step, as they are in metrics.jsonl from now on.

        Where they are the best, the model is in WORKDIR/best before: a kill in between leaves both
        to be done again.

        Raises:
          Preempted: the run is to stop.
        """
        config, first = self._run.config, hosts.is_first()
        results = self._evaluate(state)
        if self._count(step, results):
            self._hold.check()
            model_folder.write_model(
                f"{self._run.workdir}/best", state.model, self._run.network.info
            )
        epoch = step / self._run.plan.steps_per_epoch
        expected = dict(config.train.expected_top1).get(epoch)
        shown = results | ({} if expected is None else {"expected_top1": expected})
        self._writer.write(step, "eval", shown, data=self._data)
        self._showcase.evaluation(step, state)
        log(f"step {step}: eval {metrics.eval_line(shown)}", on=first)
        if warning := metrics.accuracy_warning(shown):
            log(warning, on=first)
        self._stop.check_alone()
        return results

    def resumed(self, step: int, state: TrainState) -> dict[str, float]:
        """Returns the results of the step at which the run resumes: those recorded, or new ones."""
        told = hosts.gather("the last evaluation", json.dumps(self._writer.evaluation))[0]
        recorded = json.loads(told)
        results = metrics.values_of(recorded)
        # With other images it was another evaluation; null stands for a loss that is not a number.
        if recorded.get("data") != self._data or None in results.values():
            return self.after(step, state)
        log(f"step {step}: eval {metrics.eval_line(results)} (recorded)", on=hosts.is_first())
        results.pop("expected_top1", None)
        self._count(step, results)
        return results

    def _count(self, step: int, results: dict[str, float]) -> bool:
        """Returns whether these are the best so far."""
        better = results["top1"] > self.best["top1"]
        if better:
            self.best = {"top1": results["top1"], "step": step}
        return better
