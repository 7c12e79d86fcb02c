"""A run: its config, what follows from it, and the objects that its parts share."""

import contextlib
import dataclasses
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import jax
import optax
from jax.sharding import Mesh

from deit_jax.models import registry
from deit_jax.models.info import parse_options
from deit_jax.models.network import Network, Variables

if TYPE_CHECKING:  # the step runs without ml_collections, which GPU hosts may lack
    from ml_collections import ConfigDict

    from deit_jax.config.plan import RunPlan


@dataclasses.dataclass(frozen=True)
class Run:
    """A checked run: nothing in it has cost more than reading the data's index."""

    config: "ConfigDict"
    workdir: str
    plan: "RunPlan"
    mesh: Mesh
    network: Network
    abstract: Variables  # shapes of the student's weights
    optimizer: optax.GradientTransformation
    train_source: object  # deit_jax.data.Source; None for an evaluation
    eval_source: object
    teacher_folder: str | None  # where the recipe's teacher is or will be; None without one
    notes: tuple[str, ...] = ()  # where the run is not as its config asks; the summary has them

    def input_plan(self) -> object:
        """Returns the `deit_jax.data.InputPlan` of this process."""
        from deit_jax.data import InputPlan  # TensorFlow: imported by runs alone

        index, count = jax.process_index(), jax.process_count()
        return InputPlan.of(self.config, self.plan, process_index=index, process_count=count)


def dtype_of(config: "ConfigDict") -> str:
    """Returns the type of the matmuls' operands."""
    return config.train.dtype.removesuffix("_fast")


def matmuls(config: "ConfigDict") -> AbstractContextManager:
    """Gives the context in which a run's programs are traced: how exactly float32 is multiplied."""
    if config.train.dtype == "float32_fast":
        return jax.default_matmul_precision("default")
    return contextlib.nullcontext()


def build_model(config: "ConfigDict", plan: "RunPlan", *, rngs: object = None) -> object:
    """Returns the run's model, abstract without `rngs`; `info` holds what prediction needs."""
    options = {
        "num_classes": plan.num_classes,
        "image_size": config.input.image_size,
        "drop_path_rate": config.model.drop_path_rate,
        "dtype": dtype_of(config),
    }
    if config.model.patch_size:
        options["patch_size"] = config.model.patch_size
    options |= parse_options(config.model.options)
    if config.model.attention != "auto":
        options["attention"] = config.model.attention
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
