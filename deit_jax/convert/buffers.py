"""Tensors in the references' files that are no weights: they follow from the model's structure.

RoPE-ViT keeps the places of its patches there, ViT-5 its rotary frequencies. Reading compares them
with what our model computes; writing adds them, so that the reference loads the file strictly.
"""

from collections.abc import Mapping

import numpy as np

from deit_jax.convert import layouts
from deit_jax.errors import InputError
from deit_jax.models import registry, rope
from deit_jax.models.info import ModelInfo

_ROUNDING = 1e-6  # relative
_MOST = 1e-3  # relative: the references average them with the weights, and the average drifts


def of(info: ModelInfo, layout: layouts.Layout) -> dict[str, np.ndarray]:
    """Returns the buffers of a file of `layout` with the model's weights, float32."""
    options = registry.options(info)
    kind = options.get("rope", "none")
    if layout is not layouts.REFERENCE or kind in ("none", "axial"):
        return {}
    if kind == "mixed":
        sides = np.broadcast_to(info.image_size, 2) // options["patch_size"]
        places = rope.places(tuple(sides.tolist()))
        return {f"freqs_t_{axis}": np.float32(x) for axis, x in zip("xy", places, strict=True)}
    head_dim = options["embed_dim"] // options["num_heads"]
    kinds = {"rope": rope.THETA["vit5"], "rope_reg": rope.REGISTER_THETA}
    if not options["num_registers"]:
        del kinds["rope_reg"]
    return {
        f"blocks.{block}.attn.{name}.freqs": np.float32(rope.frequencies(theta, head_dim))
        for block in range(options["depth"])
        for name, theta in kinds.items()
    }


def taken(
    tensors: Mapping[str, np.ndarray], buffers: Mapping[str, np.ndarray], what: str
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Takes the buffers away from a file's tensors.

    Returns:
      The weights, and a note where buffers are off by more than rounding: as in an EMA.

    Raises:
      InputError: a buffer says that the file is of another model.
    """
    worst = 0.0
    for key in buffers.keys() & tensors.keys():
        got, want = tensors[key], buffers[key]
        if got.shape != want.shape:
            raise InputError(f"{what}: {key} has shape {got.shape}, expected {want.shape}")
        error = float(
            np.max(np.abs(got - want) / np.where(want == 0, 1.0, np.abs(want)), initial=0.0)
        )
        if not error <= _MOST:
            raise InputError(
                f"{what}: {key} differs from the model's own by {error:.1e}, relative: the file is "
                "of a model with other rotary positions"
            )
        worst = max(worst, error)
    note = f"rotary frequencies in the file are off by up to {worst:.0e}; the exact ones are used"
    return (
        {key: tensor for key, tensor in tensors.items() if key not in buffers},
        [note] if worst > _ROUNDING else [],
    )
