"""A run: its config, what follows from it, and the objects that its parts share."""

import dataclasses

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from deit_jax.checkpoints import model_folder
from deit_jax.config.files import recorded_fields
from deit_jax.config.plan import RunPlan
from deit_jax.config.structure import check_structure
from deit_jax.config.validate import validate
from deit_jax.errors import InputError
from deit_jax.models import registry
from deit_jax.models.network import Network, Variables


@dataclasses.dataclass(frozen=True)
class Run:
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

    def input_plan(self) -> object:
        """Returns the `deit_jax.data.InputPlan` of this process."""
        from deit_jax.data import InputPlan  # TensorFlow: imported by runs alone

        index, count = jax.process_index(), jax.process_count()
        return InputPlan.of(self.config, self.plan, process_index=index, process_count=count)


def complete(config: ConfigDict, workdir: str = "") -> ConfigDict:
    """Returns the config checked, with what it leaves to the model of `init_from` filled in.

    That is `model.name` where it is "", with the model's patch size, and `input.image_size` where
    it is 0. Without distillation, the plain model takes the place of a distilled one, whose second
    head nothing would train.

    Args:
      config: as parsed; it stays as it is.
      workdir: of the run; one that began with the same `init_from` keeps its model, also where
        that folder is gone.

    Raises:
      InputError: a field is wrong, or `init_from` is no model folder.
    """
    check_structure(config)
    if config.init_from and not (config.model.name and config.input.image_size):
        config = config.copy_and_resolve_references()
        known = recorded_fields(workdir) if workdir else {}
        if known.get("init_from") != config.init_from:
            try:
                info = model_folder.read_info(config.init_from)
            except InputError as error:
                raise InputError(f"--config.init_from={config.init_from}: {error}") from error
            name = info.name
            if config.distill.kind == "none" and registry.is_distilled(name):
                name = name.replace("_distilled", "")
            patch_size = dict(info.overrides).get("patch_size", 0)
            known = {"input.image_size": info.image_size, "model.name": name}
            known["model.patch_size"] = patch_size
        if not config.model.name:
            config.model.name = known["model.name"]
            config.model.patch_size = config.model.patch_size or known["model.patch_size"]
        config.input.image_size = config.input.image_size or known["input.image_size"]
    validate(config)
    return config


def build_model(config: ConfigDict, plan: RunPlan, *, rngs: object = None) -> object:
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
