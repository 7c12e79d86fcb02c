"""The teacher: its recipe, its checks, its weights, its forward pass and its accuracy."""

import contextlib
import json
import os
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from deit_jax import folders, storage, trees
from deit_jax.checkpoints import checksums, model_folder
from deit_jax.errors import InputError
from deit_jax.models import registry, regnet_folded
from deit_jax.models.network import Network, Variables, split_model
from deit_jax.parallel import hosts
from deit_jax.parallel.mesh import replicated
from deit_jax.parallel.preemption import StopSignal
from deit_jax.training.evaluate import images_digest, split_evaluator
from deit_jax.training.run import Run, build_model, dtype_of

# The step runs without ml_collections, which GPU hosts may lack: what needs it is imported late.
if TYPE_CHECKING:
    from ml_collections import ConfigDict


@jax.named_scope("teacher")
def teacher_forward(
    teacher: Network, variables: Variables, images: jax.Array, student: registry.ModelInfo
) -> jax.Array:
    """Returns the teacher's logits [B,K] on the student's augmented batch, without gradient.

    The teacher sees what the student sees, mixing and erasing included (reference), moved from the
    student's to its own mean and standard deviation where they differ. A convolutional teacher
    sees the student's resolution, as in the reference; a transformer, which knows only its own,
    sees the images resized to that by an antialiased cubic filter, which is PIL's bicubic but for
    rounding.

    Args:
      teacher: its computation.
      variables: its weights.
      images: [B,H,W,3], normalised for the student.
      student: whose mean and standard deviation these are.
    """
    size = registry.fixed_size(teacher.info)
    if size is not None and images.shape[1:3] != (size, size):
        images = jax.image.resize(images, (len(images), size, size, 3), "cubic")
    if (teacher.info.mean, teacher.info.std) != (student.mean, student.std):
        own, shown = (
            [jnp.float32(x)[None, None, None] for x in (info.mean, info.std)]
            for info in (teacher.info, student)
        )
        images = (images * shown[1] + shown[0] - own[0]) / own[1]
    heads, _ = teacher(variables, images)
    return jax.lax.stop_gradient(sum(heads) / len(heads))


def teacher_folder(config: "ConfigDict", workdir: str) -> str | None:
    """Returns the model or run folder of the recipe's teacher; None without distillation."""
    if config.distill.kind == "none":
        return None
    return config.distill.teacher or os.path.join(workdir, "teacher")


def teacher_config(config: "ConfigDict") -> "ConfigDict":
    """Returns the recipe that trains the teacher, with all that it takes from the student's.

    See `distill.teacher_config` in `config/fields.py`.
    """
    from deit_jax.config.files import load_config
    from deit_jax.training.complete import complete

    teacher = load_config(config.distill.teacher_config)
    for group in ("dataset", "parallel", "checkpoint", "distributed"):
        teacher[group] = config[group]
    # It will see the student's images.
    for field in ("image_size", "interpolation", "mean", "std", "on_bad_image"):
        teacher.input[field] = config.input[field]
    for field in ("batch_size", "dtype", "seed", "tensorboard", "wandb"):
        teacher.train[field] = config.train[field]
    epochs = config.distill.teacher_epochs
    if epochs:
        teacher.schedule.epochs = epochs
    return complete(teacher)


def check_teacher(run: Run) -> None:
    """Raises InputError unless the teacher fits, or can be trained to fit."""
    folder, distill, ours = run.teacher_folder, run.config.distill, run.plan
    if folder is None:
        return
    if model_folder.find_model(folder) is None:
        # Never trained into a folder that was named: a misspelt one would fill with a run.
        if distill.teacher or not distill.teacher_config:
            train_one = (
                "--config.distill.teacher= trains one in WORKDIR/teacher"
                if distill.teacher_config
                else "the recipe to train it with (--config.distill.teacher_config=RECIPE)"
            )
            raise InputError(
                f"config.distill.teacher: no model folder at {folder}; name one that exists, or "
                f"{train_one}"
            )
        try:
            teacher_config(run.config)
        except InputError as error:
            raise InputError(
                f"{distill.teacher_config} (config.distill.teacher_config): {error}"
            ) from error
        return
    info = model_folder.read_info(folder)
    if info.num_classes != ours.num_classes:
        raise InputError(
            f"config.distill.teacher: {folder} has {info.num_classes} classes, but the data set "
            f"has {ours.num_classes}; train a teacher on this data set"
        )
    if other := folders.first_other(info.class_names, ours.class_names):
        place, theirs, expected = other
        raise InputError(
            f"config.distill.teacher: {folder} calls class {place} {theirs!r}, but the data set "
            f"calls it {expected!r}; its labels mean something else"
        )
    _, like = model_folder.read_network(folder)
    model_folder.check_weights(folder, like)


def abstract_teacher(run: Run, default: str = "") -> tuple[Network, Variables] | tuple[None, None]:
    """Returns the teacher's computation and the shapes of its weights, trained or not.

    Args:
      run: without a teacher, the result is (None, None).
      default: names the teacher's model where there is neither a folder nor a recipe.
    """
    folder, config = run.teacher_folder, run.config
    if folder is None:
        return None, None
    if model_folder.find_model(folder) is not None:
        found = model_folder.read_network(folder, dtype=dtype_of(config))
    elif config.distill.teacher_config:
        found = split_model(build_model(teacher_config(config), run.plan))
    else:
        options = {"num_classes": run.plan.num_classes, "dtype": dtype_of(config)}
        found = split_model(registry.abstract_model(default, **options))
    return for_devices(run.mesh, *found)


def load_teacher(run: Run) -> tuple[Network, Variables] | tuple[None, None]:
    """Returns the frozen teacher on every device of the mesh, or (None, None)."""
    from deit_jax.training import checks

    if run.teacher_folder is None:
        return None, None
    check_teacher(run)  # again: it may have been trained since
    network, like = model_folder.read_network(run.teacher_folder, dtype=dtype_of(run.config))
    variables = model_folder.read_variables(run.teacher_folder, like)
    checks.check_weights(run.teacher_folder, variables)
    network, variables = for_devices(run.mesh, network, variables)
    return network, jax.device_put(variables, replicated(run.mesh))


def for_devices(mesh: Mesh, network: Network, variables: Variables) -> tuple[Network, Variables]:
    """Returns a frozen model as the devices of a mesh compute it fastest; weights or shapes."""
    convolutional = registry.fixed_size(network.info) is None
    if convolutional and mesh.devices.flat[0].platform == "tpu":
        return regnet_folded.fold(network, variables)
    return network, variables


def teacher_accuracy(
    run: Run, teacher: Network | None, variables: Variables | None, stop: StopSignal
) -> dict[str, float]:
    """Returns the teacher's `teacher_top1` on the eval split, or {} without a teacher.

    A transformer gets whole images of its own resolution, not the student's images resized. The
    figure is kept in the workdir, with a digest of the weights, of the split and of how its images
    are prepared: where they are the same, nothing is evaluated again.
    """
    if teacher is None:
        return {}
    size = registry.fixed_size(teacher.info) or run.config.input.image_size
    facts = [teacher.info.to_json(), checksums.part(variables)]
    digest = trees.digest(images_digest(run, teacher.info, size), json.dumps(facts))
    file, kept = storage.path_of(run.workdir, "teacher_accuracy.json"), ""
    if hosts.is_first() and file.exists():
        kept = file.read_bytes().decode(errors="replace")
    kept = hosts.gather("the teacher's accuracy", kept)[0]
    with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged: anew
        saved = storage.parse_json(kept)
        if saved["digest"] == digest:
            return {"teacher_top1": float(saved["teacher_top1"])}
    top1 = split_evaluator(run, teacher, size, stop)({"": variables})["top1"]
    if hosts.is_first() and run.train_source is not None:  # an evaluation leaves the run alone
        text = json.dumps({"teacher_top1": top1, "digest": digest})
        storage.replace_text(file, text + "\n")
    return {"teacher_top1": top1}
