"""Everything before the first step: checks, data, model, teacher, initial state."""

from collections.abc import Iterable

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from deit_jax import storage
from deit_jax.checkpoints import model_folder
from deit_jax.checkpoints.fit import fit
from deit_jax.checkpoints.training import TrainCheckpoints
from deit_jax.config.plan import RunPlan, check_batch, plan_data, plan_evaluation
from deit_jax.console import doing, log
from deit_jax.errors import InputError
from deit_jax.models import registry
from deit_jax.models.info import parse_options
from deit_jax.models.network import Variables, split_model
from deit_jax.parallel import cpu_memory, hosts
from deit_jax.parallel.mesh import make_mesh, state_shardings, to_host, with_shardings
from deit_jax.training import checks, kernels, loggers, optim
from deit_jax.training.complete import as_trained, complete
from deit_jax.training.run import Run, build_model
from deit_jax.training.state import TrainState, init_key, new_state
from deit_jax.training.teacher import check_teacher, teacher_folder


def check(config: ConfigDict, workdir: str, *, mode: str = "train") -> Run:
    """Connects the processes and checks everything that can be checked before long work.

    Args:
      config: of the run.
      workdir: of the run.
      mode: what the run is checked for, as --mode names it; the same on every process.

    Raises:
      InputError: a field, a file or the data are wrong; one line that says what and how to fix it.
    """
    if not workdir:
        raise InputError("--workdir is empty, expected the folder of the run")
    storage.check_name(storage.path_of(workdir))
    if mode != "plan":  # of a run that may be read-only
        checks.check_place(workdir)
    training = mode != "eval"
    config, notes = as_trained(complete(config, workdir), workdir, training=training)
    loggers.check(config)
    hosts.start(config.distributed)
    cpu_memory.keep_memory()
    checks.check_processes(config, workdir, mode=mode)
    devices = {"num_devices": jax.device_count(), "num_processes": jax.process_count()}
    check_batch(config, **devices, training=training)
    check_model(config, jax.default_backend())

    from deit_jax import data  # TensorFlow: imported by runs alone

    with doing("opening the data", on=hosts.is_first()):
        train_source = data.open_source(config.dataset, "train") if training else None
        eval_source = data.open_source(config.dataset, "eval")
    sources = [source for source in (train_source, eval_source) if source is not None]
    for note in dict.fromkeys(note for source in sources for note in source.notes):
        log(f"note: {note}", on=hosts.is_first())
    teacher = teacher_folder(config, workdir)
    teacher_is_there = None if teacher is None else model_folder.find_model(teacher) is not None
    checks.check_data(train_source, eval_source, teacher_is_there)
    if training:
        num_eval = eval_source.num_examples
        plan = plan_data(config, train_source, num_devices=jax.device_count(), num_eval=num_eval)
    else:
        plan = plan_evaluation(eval_source)
    mesh = make_mesh(config.parallel.fsdp)
    run = assemble(config, workdir, plan, mesh, sources=(train_source, eval_source), notes=notes)
    run = kernels.tried(run)
    if not config.init_from:
        _check_new_heads(run, run.abstract)
    check_teacher(run)
    return run


def check_model(config: ConfigDict, platform: str) -> None:
    """Raises InputError where the model, or the devices' platform, lack what the recipe asks."""
    if config.train.log_attention and "num_heads" not in registry.model_options(config.model.name):
        raise InputError(
            f"config.train.log_attention is True, but config.model.name {config.model.name!r} has "
            "no attention; set it to False"
        )
    wanted = {"pallas": "tpu", "cudnn": "gpu"}.get(config.model.attention, platform)
    if platform != wanted:
        raise InputError(
            f"config.model.attention is {config.model.attention!r}, whose kernels are for "
            f"{wanted.upper()}s, but the devices here are {platform.upper()}s; set it to auto"
        )
    name, distill = config.model.name, config.distill
    options = parse_options(config.model.options)
    told = f"config.model.name {name!r}" + f" with options {config.model.options}" * bool(options)
    if distill.class_head and registry.is_distilled(name, options):
        raise InputError(
            f"config.distill.class_head is True, but {told} has a distillation token, which learns "
            "from the teacher; set it to False or choose a model without token"
        )
    if distill.kind != "none" and not (distill.class_head or registry.can_distil(name, options)):
        raise InputError(
            f"config.distill.kind is {distill.kind!r}, but {told} has no distillation token; "
            "choose a *_distilled_* model, such as deit_base_distilled_patch16_224, "
            "--config.distill.kind=none, or --config.distill.class_head=True to teach the class "
            "head"
        )


def assemble(
    config: ConfigDict,
    workdir: str,
    plan: RunPlan,
    mesh: Mesh,
    *,
    sources: tuple[object, object] = (None, None),
    notes: Iterable[str] = (),
) -> Run:
    """Puts a run together from a checked config; without `sources` it can only be compiled."""
    network, abstract = split_model(build_model(config, plan))
    return Run(
        config=config,
        workdir=workdir,
        plan=plan,
        mesh=mesh,
        network=network,
        abstract=abstract,
        optimizer=optim.make_optimizer(abstract.params, config.optimizer),
        train_source=sources[0],
        eval_source=sources[1],
        teacher_folder=teacher_folder(config, workdir),
        notes=tuple(notes),
    )


def _new_state(run: Run, variables: Variables) -> TrainState:
    return new_state(variables, run.optimizer, ema=run.config.train.ema_decay > 0)


def state_layout(run: Run) -> tuple[TrainState, TrainState]:
    """Returns the shape of every array of the run's state, and its sharding on the mesh."""
    shapes = jax.eval_shape(lambda variables: _new_state(run, variables), run.abstract)
    return shapes, state_shardings(run.mesh, shapes)


def initial_state(run: Run, checkpoints: TrainCheckpoints) -> tuple[TrainState, object, dict, str]:
    """Returns the state to start from: the latest checkpoint, else `init_from`, else scratch.

    Returns:
      The state on the mesh, its shardings, the best evaluation so far (`top1`, `step`) and a few
      words on where it came from.
    """

    def init(key: jax.Array) -> TrainState:
        rngs = nnx.Rngs(params=key)
        _, variables = split_model(build_model(run.config, run.plan, rngs=rngs))
        return _new_state(run, variables)

    key = init_key(run.config.train.seed)
    shapes, shardings = state_layout(run)
    none_yet = {"top1": -1.0, "step": -1}
    with doing("restoring the checkpoint", on=hosts.is_first()):
        restored = checkpoints.restore(with_shardings(shapes, shardings))
    if restored is not None:
        state, best, step = restored
        origin = f"resumed at step {step}"
        if run.config.init_from:
            origin += f" of {run.workdir} (so init_from {run.config.init_from} is not read)"
        return state, shardings, best, origin
    # LLVM takes minutes to optimise the hundreds of small random kernels of a large model, which
    # run once: on CPU devices without optimisation they compile in a quarter of the time.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
    start = jax.jit(init, out_shardings=shardings, compiler_options=options)
    if not run.config.init_from:
        return start(key), shardings, none_yet, "from scratch"
    folder = run.config.init_from
    source, like = model_folder.read_network(folder)
    variables = model_folder.read_variables(folder, like)
    checks.check_weights(folder, variables)
    fresh = lambda: to_host(start(key).model)  # noqa: E731
    variables, changes = fit(variables, source.info, run.abstract, run.network.info, fresh=fresh)
    for name in ("interpolation", "crop_ratio"):
        own, ours = getattr(source.info, name), getattr(run.network.info, name)
        if own != ours:
            changes.append(f"its images had {name} {own}, this run's have {ours}")
    begin = jax.jit(lambda v: _new_state(run, v), out_shardings=shardings)
    return begin(variables), shardings, none_yet, "; ".join([f"weights of {folder}", *changes])


def check_start(run: Run, *, training: bool) -> None:
    """Raises InputError unless the weights of `init_from` fit the model.

    In training they may be made to fit (`checkpoints.fit`); evaluation needs them as they are, but
    for another image size.
    """
    folder = run.config.init_from
    try:
        network, like = model_folder.read_network(folder)
        model_folder.check_weights(folder, like)
        fresh = (lambda: run.abstract) if training else None
        start, _ = fit(like, network.info, run.abstract, run.network.info, fresh=fresh)
    except InputError as error:
        raise InputError(f"--config.init_from={folder}: {error}") from error
    _check_new_heads(run, start)


def _check_new_heads(run: Run, start: Variables) -> None:
    """Raises InputError where one of two heads would neither be read nor train.

    Args:
      run: the run.
      start: what it starts from; what is new in it are leaves of `run.abstract`.
    """
    params, trainable = run.abstract.params, run.config.optimizer.trainable
    trains = optim.trainable_mask(params, trainable)
    for name in ("head", "head_dist") if "head_dist" in params else ():
        new = start.params[name]["kernel"] is params[name]["kernel"]
        if new and not trains[name]["kernel"]:
            raise InputError(
                f"config.optimizer.trainable is {trainable!r}, which leaves {name} as it is drawn, "
                f"but the model predicts with the mean of both heads; add '{name}/.*'"
            )
