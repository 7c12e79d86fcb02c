"""The effective recipe, which every run prints first: what is set, and what follows from it."""

import math

import jax
from ml_collections import ConfigDict

from deit_jax import trees
from deit_jax.checkpoints import model_folder
from deit_jax.models import registry
from deit_jax.parallel.mesh import describe_mesh, device_bytes, with_shardings
from deit_jax.training import kernels, optim
from deit_jax.training.run import Run
from deit_jax.training.setup import state_layout

_CROPS = {
    "random_resized": "crops of {scale[0]:g} to {scale[1]:g} of the area",
    "simple_random": "whole, padded by {pad} and cropped",
    "small": "whole, padded by {pad} with zeros and cropped",
}


def describe_run(run: Run, origin: str) -> str:
    """Returns the lines of the summary.

    Args:
      run: the checked run.
      origin: a few words on where its weights come from.
    """
    config, plan = run.config, run.plan
    cosub = ", co-training of two submodels" if config.train.cosub else ""
    pace = "constant within an epoch" if config.schedule.per_epoch else "changing every step"
    pmap = "; step under pmap" if config.parallel.backend == "pmap" else ""
    lines = {
        "model": _model(run, origin),
        **_attention(run),
        "data": f"{run.train_source.description}: {plan.num_train:,} train, "
        f"{plan.num_eval:,} eval; {plan.images_per_epoch:,} images an epoch, "
        f"{plan.distinct_images_per_epoch:,} distinct",
        "images": _images(config.input),
        "mixing": _mixing(config.mixing, plan.group_size),
        "loss": config.train.loss.replace("_", "-") + _untaught(run) + cosub,
        "optimiser": _optimiser(config),
        "schedule": f"{config.schedule.epochs} epochs × {plan.steps_per_epoch} steps = "
        f"{plan.total_steps:,} steps, {plan.warmup_steps:,} of warm-up; "
        f"peak rate {_peak(config)}, {pace}",
        "batch": _batch(config.train),
        "devices": describe_mesh(run.mesh) + pmap,
        "state": _state(run),
        **_compiled(),
    }
    if run.teacher_folder is not None:
        lines["teacher"] = _teacher(run)
    return _table(lines, note=run.notes, warning=plan.warnings)


def describe_evaluation(run: Run, origin: str) -> str:
    """Returns the lines of the summary of an evaluation; arguments as `describe_run`."""
    batch = f"{run.config.train.batch_size} images over all devices"
    lines = {
        "model": _model(run, origin),
        **_attention(run),
        "data": f"{run.eval_source.description}: {run.plan.num_eval:,} images",
        "batch": f"{batch}; {run.config.train.dtype} matmuls",
        "devices": describe_mesh(run.mesh),
        **_compiled(),
    }
    return _table(lines, note=run.notes)


def _compiled() -> dict[str, str]:
    """Says where programs are kept for the next start, if anywhere; the command line decides it."""
    folder = jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir
    return {"compiled": f"programs are kept in {folder}"} if folder else {}


def _table(lines: dict[str, str], **more: tuple[str, ...]) -> str:
    """Returns a row for each line, and one for each text in `more` under its name."""
    rows = [*lines.items(), *((name, text) for name, texts in more.items() for text in texts)]
    return "\n".join(f"  {name:<9} {text}" for name, text in rows)


def _untaught(run: Run) -> str:
    """Says what trains the distillation head of a model that has no teacher."""
    distilled = "head_dist" in run.abstract.params
    no_teacher = distilled and run.teacher_folder is None
    return " of the mean of both heads: without a teacher both learn from labels" * no_teacher


def _unseen(info: registry.ModelInfo) -> str:
    """Says how many rows and columns of pixels the patches leave out, if any."""
    rest = info.image_size % registry.options(info).get("patch_size", 1)  # RegNetY has no patches
    return f" ({rest} pixels at the right and the bottom in no patch)" if rest else ""


def _joined(parts: dict[str, object]) -> str:
    """ "name value, name value" of the parts that are on."""
    return ", ".join(f"{name} {value:g}" for name, value in parts.items() if value)


def _model(run: Run, origin: str) -> str:
    info, params = run.network.info, run.abstract.params
    mask = optim.trainable_mask(params, run.config.optimizer.trainable)
    count, trained = trees.param_count(params), trees.param_count(trees.select(params, mask))
    some = f" ({trained:,} of them train)" if trained < count else ""
    rate = run.config.model.drop_path_rate
    drop = f", drop path {rate:g}" if rate else ""
    options = run.config.model.options
    options = f", with {options}" if options else ""
    return (
        f"{info.name}, {count:,} parameters{some}, {info.image_size}×{info.image_size}"
        f"{_unseen(info)}, "
        f"{info.num_classes} classes{drop}{options}, {origin}"
    )


def _attention(run: Run) -> dict[str, str]:
    """Says how attention is computed, in a model that has it."""
    words = {"pallas": "kernels for TPUs (Pallas)", "cudnn": "cuDNN", "xla": "XLA"}
    words["xla_remat"] = "XLA, weights recomputed"
    chosen = kernels.implementation(run)
    return {"attention": words[chosen]} if chosen else {}


def _images(config: ConfigDict) -> str:
    parts = [_CROPS[config.train_crop].format(**config)]
    parts += [config.auto_augment] if config.auto_augment else []
    parts += ["3-Augment"] if config.three_augment else []
    rates = _joined({"flip": config.hflip, "colour jitter": config.color_jitter})
    parts += [rates] if rates else []
    parts += [f"{config.repeats} views of each"] if config.repeats > 1 else []
    return ", ".join(parts)


def _mixing(config: ConfigDict, group_size: int) -> str:
    shrunk = f" (recipe: {config.group_size}; must divide the batch of one device)"
    parts = {"mixup": config.mixup_alpha, "cutmix": config.cutmix_alpha}
    mixed = _joined(parts if config.prob else {})
    if mixed:
        mixed += f", in groups of {group_size}{shrunk * (group_size != config.group_size)}"
        mixed += f", with probability {config.prob:g}" if config.prob < 1 else ""
    rest = _joined({"smoothing": config.smoothing, "random erasing": config.random_erasing})
    return "; ".join(filter(None, (mixed, rest))) or "none"


def _optimiser(config: ConfigDict) -> str:
    optimizer = config.optimizer
    parts = {"weight decay": optimizer.weight_decay, "gradient clipped at": optimizer.clip_norm}
    ema = _joined({"EMA": config.train.ema_decay})
    return ", ".join(filter(None, (optimizer.name, _joined(parts), ema)))


def _peak(config: ConfigDict) -> str:
    """The peak rate, and how it follows from the batch where it is DeiT's scaling rule."""
    lr, batch = config.optimizer.lr, config.train.batch_size
    rule = f" = 5e-4 · {batch} / 512" if math.isclose(lr, 5e-4 * batch / 512) else ""
    return f"{lr:g}{rule}"


def _batch(config: ConfigDict) -> str:
    parts = config.accumulate_steps
    micro = f" in {parts} micro-batches" if parts > 1 else ""
    return f"{config.batch_size} images over all devices{micro}; {config.dtype} matmuls"


def _state(run: Run) -> str:
    """How much of a device's memory the state takes, and how much there would be on one device."""
    shapes, shardings = state_layout(run)
    state = with_shardings(shapes, shardings)
    sizes = {
        "weights": device_bytes(state.model),
        "optimiser": device_bytes(state.opt_state),
        "EMA": device_bytes(state.ema),
    }
    parts = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in sizes.items() if size)
    line = f"{sum(sizes.values()) / 2**20:,.1f} MiB on each device ({parts})"
    kept = (shapes.model, shapes.opt_state, shapes.ema)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))
    return line if whole == sum(sizes.values()) else f"{line}, of {whole / 2**20:,.1f} in all"


def _teacher(run: Run) -> str:
    distill, folder = run.config.distill, run.teacher_folder
    soft = f", temperature {distill.temperature:g}" if distill.kind == "soft" else ""
    line = f"{folder}: {distill.kind} distillation, weight {distill.alpha:g}{soft}"
    line += ", on the class head" * distill.class_head
    if model_folder.find_model(folder):
        size = registry.fixed_size(model_folder.read_info(folder))
        if size not in (None, run.network.info.image_size):
            line += f"; it sees the images resized to {size}×{size}"
    return line
