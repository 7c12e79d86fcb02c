"""deit-jax: DeiT and DeiT III in JAX/Flax. The public names are imported on first use."""

import importlib

__version__ = "0.2.0"  # setup.py reads it

_HOME = {
    "InputError": "deit_jax.errors",
    "create_model": "deit_jax.convert.load",
    "evaluate": "deit_jax.training.loop",
    "list_models": "deit_jax.models.registry",
    "load_checkpoint": "deit_jax.checkpoints.model_folder",
    "load_config": "deit_jax.config.files",
    "load_model": "deit_jax.convert.load",
    "save_model": "deit_jax.checkpoints.model_folder",
    "preprocess": "deit_jax.inference.preprocess",
    "train": "deit_jax.training.loop",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'deit_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
