"""Trains a run, and evaluates one."""

import collections
import contextlib
import dataclasses
import json
import time
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from deit_jax import storage
from deit_jax.checkpoints import model_folder
from deit_jax.checkpoints.recovery import is_step
from deit_jax.checkpoints.training import TrainCheckpoints
from deit_jax.config.files import changed_fields, write_config
from deit_jax.console import doing, log
from deit_jax.errors import InputError, NonFiniteLoss, Preempted
from deit_jax.models.network import Network, Variables
from deit_jax.parallel import devices, hosts, lease, preemption
from deit_jax.parallel.mesh import batch_sharding, replicated, to_global
from deit_jax.training import checks, continuation, metrics, pmap, summary
from deit_jax.training.evaluate import evaluator, make_attention_probe, skipped
from deit_jax.training.evaluations import Evaluations
from deit_jax.training.run import Run, matmuls
from deit_jax.training.setup import check, check_start, initial_state
from deit_jax.training.showcase import Showcase
from deit_jax.training.state import TrainState
from deit_jax.training.step import make_train_step
from deit_jax.training.teacher import load_teacher, teacher_accuracy, teacher_config

# With more, collectives on CPU devices can deadlock, and processes stop after different steps.
_STEPS_IN_FLIGHT = 2


def train(config: ConfigDict, workdir: str) -> dict[str, float]:
    """Trains, resumes or finishes the run of `workdir`, and its teacher where there is none yet.

    Returns:
      The final report: `top1`, `top5` (percent), `loss`, `num_examples`; with two heads `top1_cls`
      and `top1_dist`; all again with `ema_` where the EMA is on; with a teacher `teacher_top1`.

    Raises:
      InputError: before any long work, if the config, the data or the workdir are wrong.
      Preempted: after SIGTERM, with the state saved.
      NonFiniteLoss: see `train.max_nonfinite_steps`.

    It never ends the interpreter, leaves SIGTERM as it was, and may be called again.
    """
    with preemption.StopSignal() as stop:
        return _run(config, workdir, stop)


def _run(config: ConfigDict, workdir: str, stop: preemption.StopSignal) -> dict[str, float]:
    run = check(config, workdir)
    with (
        lease.held(workdir) as hold,
        matmuls(run.config),
        contextlib.closing(open_checkpoints(run, training=True, hold=hold)) as checkpoints,
    ):
        folder = run.teacher_folder
        stop.check_alone()
        if folder is not None and model_folder.find_model(folder) is None:
            log(f"No teacher in {folder}: training one first.", on=hosts.is_first())
            _run(teacher_config(run.config), folder, stop)
            stop.saves_first = False
            log("The teacher is ready; training the student.", on=hosts.is_first())
        return _train(run, checkpoints, stop, hold)


def evaluate(config: ConfigDict, workdir: str) -> dict[str, float]:
    """Evaluates the latest checkpoint of `workdir` (or `init_from`); reports as `train` does.

    Images are prepared as the model was trained, whatever the recipe says. Raises Preempted after
    SIGTERM, between two batches.
    """
    with preemption.StopSignal() as stop:
        return _evaluate(config, workdir, stop)


def _evaluate(config: ConfigDict, workdir: str, stop: preemption.StopSignal) -> dict[str, float]:
    run = check(config, workdir, mode="eval")
    if not holds_checkpoint(workdir) and not config.init_from:
        raise InputError(
            f"--workdir={workdir} holds no checkpoint to evaluate; train first, or name a model "
            "folder by --config.init_from"
        )
    opened = contextlib.closing(open_checkpoints(run, training=False))
    with matmuls(run.config), opened as checkpoints:
        state, _, _, origin = initial_state(run, checkpoints)
        stop.check_alone()
        log(summary.describe_evaluation(run, origin), on=hosts.is_first())
        teacher = None, None
        if run.teacher_folder is not None and model_folder.find_model(run.teacher_folder):
            teacher = load_teacher(run)
        _, facts = checkpoints.found or (0, {})
        writer = metrics.MetricWriter(
            workdir,
            steps_per_epoch=facts.get("steps_per_epoch", 0),
            beside=lease.is_held(workdir),
            on=hosts.is_first(),
        )
        with contextlib.closing(writer):
            final = evaluator(run, stop)(state) | teacher_accuracy(run, *teacher, stop)
            return _report(writer, int(state.step), final)


def _train(
    run: Run, checkpoints: TrainCheckpoints, stop: preemption.StopSignal, hold: lease.Lease
) -> dict[str, float]:
    from deit_jax import data

    config, plan, workdir, first = run.config, run.plan, run.workdir, hosts.is_first()
    state, shardings, best, origin = initial_state(run, checkpoints)
    step = int(state.step)
    stop.check_alone()
    log(f"Run {workdir}\n{summary.describe_run(run, origin)}", on=first)
    if first:
        for change in changed_fields(config, workdir) if origin.startswith("resumed") else ():
            log(f"  changed   {change}")
        write_config(config, workdir)
    teacher, teacher_variables = load_teacher(run)
    teacher_report = teacher_accuracy(run, teacher, teacher_variables, stop)
    if teacher_report:
        log(f"Teacher top-1 on the eval split: {teacher_report['teacher_top1']:.2f} %", on=first)

    train_step = jit_train_step(run, shardings, teacher)
    probe = None
    if config.train.log_attention:
        probe = make_attention_probe(run.network)
        probe = jax.jit(devices.of(run.mesh)(probe), out_shardings=replicated(run.mesh))
    writer = metrics.MetricWriter(
        workdir,
        resume_step=step,
        steps_per_epoch=plan.steps_per_epoch,
        tensorboard=config.train.tensorboard,
        wandb=config.train.wandb,
        check=hold.check_here,
        on=first,
    )
    progress = metrics.Progress(batch_size=config.train.batch_size, total_steps=plan.total_steps)
    window, showcase = _Window(run), Showcase(run, writer)
    evaluations = Evaluations(run, writer, stop, best, hold, showcase)
    if step >= plan.total_steps:
        log(f"Already finished at step {step}.", on=first)
        if int(state.nonfinite_steps) >= config.train.max_nonfinite_steps:
            raise NonFiniteLoss(_nonfinite_report(run, step))

    def save() -> None:
        window.finish()
        writer.sync()
        checkpoints.save(state, run.network.info, step=step, best=evaluations.best)

    def stopped() -> Preempted:
        return Preempted(f"stopped and saved at step {step}; run the same command to go on")

    start, compiling = step, doing("compiling the training step", on=first)
    with contextlib.closing(writer):
        showcase.config(step)
        if evaluations.due(step):  # the run ended during the evaluation, or after it
            results = evaluations.resumed(step, state)
        stop.check_alone()
        batches = data.train_batches(run.train_source, run.input_plan(), start_step=step)
        while step < plan.total_steps:
            begin = time.perf_counter()
            batch = next(batches)
            progress.waited(time.perf_counter() - begin)
            if step == start:
                showcase.batch(step, batch)
            batch = to_global(batch, batch_sharding(run.mesh))
            with compiling if step == start else contextlib.nullcontext():
                state, measured = train_step(state, teacher_variables, batch)
            stop.saves_first = True
            step += 1
            window.add(step, measured)
            progress.step_done()
            checkpoints.check_saves()
            # Asked once a step: a signal between two answers must not skip the save.
            last, stopping = step == plan.total_steps, stop.asked()
            if last or step % config.train.log_every_steps == 0:
                values = window.means() | progress.report(step) | skipped(batches, config)
                if probe is not None:
                    begin = time.perf_counter()
                    values["attention_max"] = float(probe(state.model, batch["image"]))
                    progress.pause(time.perf_counter() - begin)
                writer.write(step, "train", values)
                line = metrics.train_line(step, plan.total_steps, plan.steps_per_epoch, values)
                log(line, on=first)

            begin = time.perf_counter()
            if evaluations.due(step):
                window.finish()
            due = any(_due(step, every) for every in plan.save_every)
            if last or stopping or due or window.failed is not None:
                save()
            if window.failed is not None:
                raise NonFiniteLoss(window.failed)
            if stopping:
                raise stopped()
            if evaluations.due(step):
                try:
                    results = evaluations.after(step, state)
                except Preempted:
                    save()
                    raise stopped() from None
                if evaluations.best["step"] == step:
                    save()
            progress.pause(time.perf_counter() - begin)

        hold.check()
        _write_final_models(run, state)
        return _report(writer, step, results | teacher_report)


def jit_train_step(
    run: Run, shardings: object, teacher: Network | None
) -> Callable[[TrainState, Variables | None, dict], tuple[TrainState, dict]]:
    """The training step compiled for the run's devices; it consumes (donates) the given state.

    Args:
      run: the checked run.
      shardings: of the state, from `setup.initial_state`.
      teacher: from `teacher.load_teacher`.
    """
    if run.config.parallel.backend == "pmap":
        return pmap.pmap_train_step(run, teacher)
    everywhere = replicated(run.mesh)
    step = make_train_step(
        run.config, run.plan, run.network, run.optimizer, teacher=teacher, replicated=everywhere
    )
    return jax.jit(
        devices.of(run.mesh)(step),
        donate_argnums=0,
        in_shardings=(shardings, everywhere, batch_sharding(run.mesh)),
        out_shardings=(shardings, everywhere),
    )


def _due(step: int, every: int) -> bool:
    """Returns whether something due every `every` steps (0: never) is due after `step`."""
    return every > 0 and step % every == 0


class _Window:
    """Train metrics since the last log line; keeps the host from running ahead of the device."""

    def __init__(self, run: Run):
        self._run = run
        self._pending: collections.deque = collections.deque()
        self._sums: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._count = 0
        self.failed: str | None = None  # why the run must stop

    def add(self, step: int, measured: dict[str, jax.Array]) -> None:
        self._pending.append((step, measured))
        while len(self._pending) >= _STEPS_IN_FLIGHT:  # one more is dispatched before the next call
            self._collect()

    def finish(self) -> None:
        """Waits for every step so far."""
        while self._pending:
            self._collect()

    def _collect(self) -> None:
        step, measured = self._pending.popleft()
        self._last = {name: float(value) for name, value in jax.device_get(measured).items()}
        limit = self._run.config.train.max_nonfinite_steps
        if self._last["nonfinite_steps"] >= limit and self.failed is None:
            self.failed = _nonfinite_report(self._run, step)
        if self._last["nonfinite_steps"] == 0:
            self._count += 1
            for name, value in self._last.items():
                self._sums[name] = self._sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """Means over the finite steps since the last call; rate and counters as they are now."""
        self.finish()
        means = {name: total / self._count for name, total in self._sums.items()}
        for name in ("learning_rate", "nonfinite_steps", "nonfinite_total"):
            means[name] = self._last[name]
        self._sums, self._count = {}, 0
        return means


def _nonfinite_report(run: Run, step: int) -> str:
    """Describes a run of non-finite steps that ends at `step`; names the examples of the first."""
    from deit_jax import data

    config = run.config
    first = step - config.train.max_nonfinite_steps + 1
    ids = data.example_ids(run.train_source, run.input_plan(), first - 1)
    shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
    return (
        f"loss or gradient not finite in steps {first} to {step} (seed {config.train.seed}); the "
        "last good weights are saved; lower config.optimizer.lr or set config.optimizer.clip_norm. "
        f"Examples of step {first}: {shown}"
    )


def _write_final_models(run: Run, state: TrainState) -> None:
    """WORKDIR/model (the raw weights, as the reference releases them) and model_ema."""
    info = run.network.info
    model_folder.write_model(f"{run.workdir}/model", state.model, info)
    if state.ema is not None:
        info = dataclasses.replace(info, weights="ema")
        model_folder.write_model(f"{run.workdir}/model_ema", state.ema, info)


def holds_checkpoint(workdir: str) -> bool:
    """Returns whether `workdir` holds a training checkpoint."""
    return any(is_step(path.name) for path in storage.path_of(workdir, "checkpoints").glob("*"))


def open_checkpoints(
    run: Run, *, training: bool, hold: lease.Lease | None = None
) -> TrainCheckpoints:
    """Opens the checkpoints of the run's workdir and checks that they are of its model.

    Raises:
      InputError: they are not, or `init_from` does not fit, or the workdir cannot be written.
    """
    if run.config.init_from and not holds_checkpoint(run.workdir):
        check_start(run, training=training)
    if training and hosts.is_first():
        checks.check_writing(run.workdir)
        for name in ("model", "model_ema", "best"):  # written hours later
            model_folder.check_place(storage.path_of(run.workdir, name))
    checkpoints = TrainCheckpoints(
        run.workdir,
        keep=run.config.checkpoint.keep,
        set_aside=training,
        facts=continuation.facts(run) if training else None,
        hold=hold,
    )
    checkpoints.check(run.network.info, ema=run.config.train.ema_decay > 0)
    if training and checkpoints.found is not None:
        for note in continuation.check(*checkpoints.found, run):
            log(f"note: {note}", on=hosts.is_first())
    return checkpoints


def _report(writer: metrics.MetricWriter, step: int, final: dict[str, float]) -> dict[str, float]:
    writer.write(step, "final", final)
    log(f"Final report at step {step}:", on=hosts.is_first())
    log(json.dumps(final, indent=2), on=hosts.is_first())
    return final
