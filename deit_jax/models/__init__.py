"""Vision transformers, RegNetY teachers and the table of their names."""

from deit_jax.models.registry import (
    ModelInfo,
    abstract_model,
    create_model,
    is_distilled,
    list_models,
    model_info,
)

__all__ = [
    "ModelInfo",
    "abstract_model",
    "create_model",
    "is_distilled",
    "list_models",
    "model_info",
]
