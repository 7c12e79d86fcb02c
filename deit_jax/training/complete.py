"""Fills in what a config leaves to the model that it fine-tunes, and checks the config."""

import contextlib

from ml_collections import ConfigDict

from deit_jax.checkpoints import model_folder
from deit_jax.checkpoints.training import saved_info
from deit_jax.config.files import recorded_fields
from deit_jax.config.structure import check_structure
from deit_jax.config.validate import validate
from deit_jax.errors import InputError
from deit_jax.models.info import format_options


def complete(config: ConfigDict, workdir: str = "") -> ConfigDict:
    """Returns the config checked, with what it leaves to the model of `init_from` filled in.

    That is `model.name` where it is "", with the model's patch size and options, and
    `input.image_size` where it is 0.

    Args:
      config: as parsed; it stays as it is.
      workdir: of the run; one that began with the same `init_from` keeps its model, also where
        that folder is gone.

    Raises:
      InputError: a field is wrong, or `init_from` is not a model folder.
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
            known = {"input.image_size": info.side, "model.name": info.name}
            own = dict(info.overrides)
            known["model.patch_size"] = own.pop("patch_size", 0)
            known["model.options"] = format_options(own)
        if not config.model.name:
            config.model.name = known["model.name"]
            config.model.patch_size = config.model.patch_size or known["model.patch_size"]
            config.model.options = config.model.options or known.get("model.options", "")
        config.input.image_size = config.input.image_size or known["input.image_size"]
    validate(config)
    return config


def as_trained(config: ConfigDict, workdir: str, *, training: bool) -> tuple[ConfigDict, list[str]]:
    """Returns the config with the preprocessing of the weights it starts from, and notes on that.

    Mean, std, crop and interpolation belong to the weights: with others, a model loses accuracy
    without a word. Training keeps mean and std, and evaluates with the recipe's crop and
    interpolation, with which it trains. The image size may be chosen. A model folder that is
    evaluated holds one set of weights, so there is no EMA.

    Args:
      config: of the run.
      workdir: of the run, whose checkpoint counts, or else `init_from`.
      training: whether it is to train, not to be evaluated alone.

    Raises:
      InputError: a run cannot prepare images as the model was trained.
    """
    info = None
    with contextlib.suppress(NotADirectoryError):  # `checks.check_writing` says so
        info = saved_info(workdir)
    resumed = info is not None
    if not resumed and config.init_from:
        with contextlib.suppress(InputError):  # `setup.check_start` says what is wrong
            info = model_folder.read_info(config.init_from)
    if info is None:
        return config, []
    chosen = config.input
    own = {"mean": tuple(info.mean), "std": tuple(info.std)}
    if not training:
        own["interpolation"] = info.interpolation
        if info.crop_ratio is not None:
            own["crop_ratio"] = info.crop_ratio
        whole = info.crop_ratio is None
        if whole != (chosen.train_crop == "small"):  # which resizes whole images
            own["train_crop"] = "small" if whole else "random_resized"
    changed = {name: value for name, value in own.items() if chosen[name] != value}
    doing = "training" if training else "evaluating"
    notes = [
        f"{doing} with input.{name} {value}, as the model was trained, not {chosen[name]}"
        for name, value in changed.items()
    ]
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.input.update(changed)
    if not training and not resumed:
        config.train.ema_decay = 0.0
    try:
        validate(config)
    except InputError as error:
        raise InputError(
            f"as the model of {workdir if resumed else config.init_from} was trained, {error}"
        ) from error
    return config, notes
