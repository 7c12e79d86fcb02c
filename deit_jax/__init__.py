"""deit-jax: DeiT and DeiT III in JAX/Flax. The public names are imported on first use."""

import importlib

_HOME = {
    "InputError": "deit_jax.errors",
    "create_model": "deit_jax.models.registry",
    "list_models": "deit_jax.models.registry",
    "load_checkpoint": "deit_jax.model_folder",
    "load_model": "deit_jax.model_folder",
    "save_model": "deit_jax.model_folder",
    # Not "preprocess.py": importing a module binds its name in the package, over the function.
    "preprocess": "deit_jax.preprocessing",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'deit_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
