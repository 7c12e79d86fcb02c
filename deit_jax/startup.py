"""Everything before the first step: checks, data, model, teacher, initial state."""

import dataclasses
import os

import jax
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from deit_jax import checkpoint, host_memory, model_folder, optim, parallel, preflight, processes
from deit_jax.config import RunPlan, check_batch, load_config, plan_run, validate
from deit_jax.convert import surgery
from deit_jax.errors import InputError
from deit_jax.metrics import import_tensorboard
from deit_jax.models import registry
from deit_jax.steps import Network, TrainState, Variables, new_state, split_model


@dataclasses.dataclass(frozen=True)
class Setup:
    """A checked run: nothing in it has cost more than reading the data's index."""

    config: ConfigDict
    workdir: str
    plan: RunPlan
    mesh: Mesh
    network: Network
    abstract: Variables  # shapes of the student's weights
    optimizer: optax.GradientTransformation
    train_source: object  # deit_jax.data.Source
    eval_source: object
    teacher_folder: str | None  # where the recipe's teacher is or will be; None without one


def check(config: ConfigDict, workdir: str, *, mode: str = "train") -> Setup:
    """Connects the processes and checks everything that can be checked before long work.

    Args:
      config: of the run.
      workdir: of the run.
      mode: what the run is checked for, as --mode names it; the same on every process.

    Raises:
      InputError: a field, a file or the data are wrong; one line that says what and how to fix it.
    """
    validate(config)
    if config.train.tensorboard:
        import_tensorboard()
    processes.start(config.distributed)
    host_memory.keep()
    preflight.check_processes(config, workdir, mode=mode)
    check_batch(config, num_devices=jax.device_count(), num_processes=jax.process_count())
    check_model(config)

    from deit_jax import data  # TensorFlow: imported by runs alone

    train_source = data.open_source(config.dataset, "train")
    eval_source = data.open_source(config.dataset, "eval")
    teacher = _teacher_folder(config, workdir)
    teacher_is_there = None if teacher is None else model_folder.find_model(teacher) is not None
    preflight.check_data(train_source, eval_source, teacher_is_there)
    plan = plan_run(
        config,
        num_train=train_source.num_examples,
        num_eval=eval_source.num_examples,
        num_classes=train_source.num_classes,
        class_names=train_source.class_names,
        num_devices=jax.device_count(),
    )
    mesh = parallel.make_mesh(config.parallel.fsdp)
    setup = assemble(config, workdir, plan, mesh, sources=(train_source, eval_source))
    _check_teacher(setup)
    return setup


def check_model(config: ConfigDict) -> None:
    """Raises InputError where the model lacks what the recipe asks of it."""
    if config.train.log_attention and "num_heads" not in registry.model_options(config.model.name):
        raise InputError(
            f"config.train.log_attention is True, but config.model.name {config.model.name!r} has "
            "no attention; set it to False"
        )
    if config.distill.kind != "none" and not registry.is_distilled(config.model.name):
        raise InputError(
            f"config.distill.kind is {config.distill.kind!r}, but config.model.name "
            f"{config.model.name!r} has no distillation token; choose a *_distilled_* model, such "
            "as deit_base_distilled_patch16_224, or --config.distill.kind=none"
        )


def assemble(
    config: ConfigDict,
    workdir: str,
    plan: RunPlan,
    mesh: Mesh,
    *,
    sources: tuple[object, object] = (None, None),
) -> Setup:
    """Puts a run together from a checked config; without `sources` it can only be compiled."""
    network, abstract = split_model(_build(config, plan))
    return Setup(
        config=config,
        workdir=workdir,
        plan=plan,
        mesh=mesh,
        network=network,
        abstract=abstract,
        optimizer=optim.make_optimizer(abstract.params, config.optimizer),
        train_source=sources[0],
        eval_source=sources[1],
        teacher_folder=_teacher_folder(config, workdir),
    )


def _build(config: ConfigDict, plan: RunPlan, *, rngs: object = None) -> object:
    """The run's model, abstract without `rngs`; `info` holds all that prediction needs."""
    options = {
        "num_classes": plan.num_classes,
        "image_size": config.input.image_size,
        "drop_path_rate": config.model.drop_path_rate,
        "dtype": config.train.dtype,
    }
    if config.model.patch_size:
        options["patch_size"] = config.model.patch_size
    if config.model.remat:
        options["remat"] = True
    if rngs is None:
        model = registry.abstract_model(config.model.name, **options)
    else:
        model = registry.create_model(config.model.name, **options, rngs=rngs)
    uncropped = config.input.train_crop == "small"
    model.info = dataclasses.replace(
        model.info,
        class_names=plan.class_names,
        mean=tuple(config.input.mean),
        std=tuple(config.input.std),
        crop_ratio=None if uncropped else config.input.crop_ratio,
        interpolation=config.input.interpolation,
        source=f"deit-jax, {config.dataset.source} {config.dataset.name}".rstrip(),
    )
    return model


def _teacher_folder(config: ConfigDict, workdir: str) -> str | None:
    if config.distill.kind == "none":
        return None
    return config.distill.teacher or os.path.join(workdir, "teacher")


def teacher_config(config: ConfigDict) -> ConfigDict:
    """The recipe that trains the teacher, with all that it takes over from the student's.

    See `distill.teacher_config` in `fields`.
    """
    teacher = load_config(config.distill.teacher_config)
    for group in ("dataset", "parallel", "checkpoint", "distributed"):
        teacher[group] = config[group]
    # It will see the student's images.
    for field in ("image_size", "interpolation", "mean", "std", "on_bad_image"):
        teacher.input[field] = config.input[field]
    for field in ("batch_size", "dtype", "seed", "tensorboard"):
        teacher.train[field] = config.train[field]
    epochs = config.distill.teacher_epochs
    if epochs:
        teacher.schedule.epochs = epochs
        teacher.schedule.warmup_epochs = min(teacher.schedule.warmup_epochs, epochs // 2)
    return teacher


def _check_teacher(setup: Setup) -> None:
    """Raises InputError unless the teacher fits, or can be trained to fit."""
    folder, distill = setup.teacher_folder, setup.config.distill
    if folder is None:
        return
    if model_folder.find_model(folder) is None:
        # Never trained into a folder that was named: a misspelt one would fill with a run.
        if distill.teacher or not distill.teacher_config:
            train_one = (
                "--config.distill.teacher= trains one in WORKDIR/teacher"
                if distill.teacher_config
                else "the recipe to train it with (--config.distill.teacher_config=configs/...)"
            )
            raise InputError(
                f"config.distill.teacher: no model folder at {folder}; name one that exists, or "
                f"{train_one}"
            )
        try:
            validate(teacher_config(setup.config))
        except InputError as error:
            raise InputError(
                f"{distill.teacher_config} (config.distill.teacher_config): {error}"
            ) from error
        return
    info = model_folder.read_info(folder)
    ours = setup.plan
    if info.num_classes != ours.num_classes:
        raise InputError(
            f"config.distill.teacher: {folder} has {info.num_classes} classes, but the data set "
            f"has {ours.num_classes}; train a teacher on this data set"
        )
    if info.class_names and ours.class_names and info.class_names != ours.class_names:
        pairs = zip(info.class_names, ours.class_names, strict=True)
        place, (theirs, expected) = next((i, p) for i, p in enumerate(pairs) if p[0] != p[1])
        raise InputError(
            f"config.distill.teacher: {folder} calls class {place} {theirs!r}, but the data set "
            f"calls it {expected!r}; its labels mean something else"
        )
    _, like = model_folder.read_network(folder)
    model_folder.check_weights(folder, like)


def abstract_teacher(
    setup: Setup, default: str = ""
) -> tuple[Network, Variables] | tuple[None, None]:
    """The teacher's computation and the shapes of its weights, trained or not; or (None, None).

    `default` names its model where there is neither a folder nor a recipe.
    """
    folder, config = setup.teacher_folder, setup.config
    if folder is None:
        return None, None
    if model_folder.find_model(folder) is not None:
        return model_folder.read_network(folder, dtype=config.train.dtype)
    if config.distill.teacher_config:
        return split_model(_build(teacher_config(config), setup.plan))
    options = {"num_classes": setup.plan.num_classes, "dtype": config.train.dtype}
    return split_model(registry.abstract_model(default, **options))


def load_teacher(setup: Setup) -> tuple[Network, Variables] | tuple[None, None]:
    """The frozen teacher on every device of the mesh, or (None, None)."""
    if setup.teacher_folder is None:
        return None, None
    _check_teacher(setup)  # again: it may have been trained since
    network, like = model_folder.read_network(setup.teacher_folder, dtype=setup.config.train.dtype)
    variables = model_folder.read_variables(setup.teacher_folder, like)
    preflight.check_weights(setup.teacher_folder, variables)
    return network, parallel.replicate(variables, setup.mesh)


def _new_state(setup: Setup, variables: Variables) -> TrainState:
    return new_state(variables, setup.optimizer, ema=setup.config.train.ema_decay > 0)


def state_layout(setup: Setup) -> tuple[TrainState, TrainState]:
    """The shape of every array of the run's state, and its sharding on the mesh."""
    shapes = jax.eval_shape(lambda variables: _new_state(setup, variables), setup.abstract)
    return shapes, parallel.state_shardings(setup.mesh, shapes)


def initial_state(
    setup: Setup, checkpoints: checkpoint.TrainCheckpoints
) -> tuple[TrainState, object, dict, str]:
    """The state to start from: the workdir's latest checkpoint, else `init_from`, else scratch.

    Returns:
      The state on the mesh, its shardings, the best evaluation so far (`top1`, `step`) and a few
      words on where it came from.
    """

    def init(key: jax.Array) -> TrainState:
        rngs = nnx.Rngs(params=key)
        _, variables = split_model(_build(setup.config, setup.plan, rngs=rngs))
        return _new_state(setup, variables)

    key = jax.random.key(setup.config.train.seed)
    shapes, shardings = state_layout(setup)
    none_yet = {"top1": -1.0, "step": -1}
    latest = checkpoints.latest_step()
    if latest is not None:
        state, best = checkpoints.restore(parallel.place(shapes, shardings))
        origin = f"resumed at step {latest}"
        if setup.config.init_from:
            origin += f" of {setup.workdir} (so init_from {setup.config.init_from} is not read)"
        return state, shardings, best, origin
    # LLVM takes minutes to optimise the hundreds of small random kernels of a large model, which
    # run once: on CPU devices without optimisation they compile in a quarter of the time.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
    start = jax.jit(init, out_shardings=shardings, compiler_options=options)
    if not setup.config.init_from:
        return start(key), shardings, none_yet, "from scratch"
    folder = setup.config.init_from
    source, like = model_folder.read_network(folder)
    variables = model_folder.read_variables(folder, like)
    preflight.check_weights(folder, variables)
    _, notices = _fit(setup, like, source.info, fresh=setup.abstract)
    fresh = parallel.to_host(start(key).model) if notices else None  # what is new comes from it
    variables, notices = _fit(setup, variables, source.info, fresh=fresh)
    begin = jax.jit(lambda v: _new_state(setup, v), out_shardings=shardings)
    return begin(variables), shardings, none_yet, "; ".join([f"weights of {folder}", *notices])


def check_start(setup: Setup, *, training: bool) -> None:
    """Raises InputError unless the weights of `init_from` fit the model.

    In training they may be made to fit (`surgery.fit`); evaluation needs them as they are, but for
    another image size.
    """
    folder = setup.config.init_from
    try:
        network, like = model_folder.read_network(folder)
        model_folder.check_weights(folder, like)
        _fit(setup, like, network.info, fresh=setup.abstract if training else None)
    except InputError as error:
        raise InputError(f"--config.init_from={folder}: {error}") from error


def _fit(
    setup: Setup, variables: Variables, info: registry.ModelInfo, *, fresh: Variables | None
) -> tuple[Variables, list[str]]:
    return surgery.fit(variables, info, setup.abstract, setup.network.info, fresh=fresh)
