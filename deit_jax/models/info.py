"""Describes a model: what travels with its weights in `model.json` and in converted files."""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

from deit_jax.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """Everything needed to predict with a model besides its weights; `model.json` holds it.

    A `crop_ratio` of None means that evaluation resizes the whole image and crops nothing.
    `overrides` holds the structural options that differ from the registry's, as (option, value)
    pairs sorted by option. `source` says where the weights come from, `weights` which: "raw" or
    "ema". `num_batches_tracked` is PyTorch's count of updates of each BatchNorm layer, kept for the
    way back: sorted by the layers' names, or one number where all agree.
    """

    name: str
    num_classes: int
    image_size: int
    class_names: tuple[str, ...] = ()
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    crop_ratio: float | None = 0.875
    interpolation: str = "bicubic"
    overrides: tuple[tuple[str, Any], ...] = ()
    source: str = ""
    weights: str = "raw"
    num_batches_tracked: tuple[int, ...] = ()

    def __post_init__(self):
        for field in ("class_names", "mean", "std", "num_batches_tracked"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        object.__setattr__(self, "overrides", tuple(tuple(pair) for pair in self.overrides))

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON knows them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, fields: Any) -> "ModelInfo":
        """Rebuilds what `to_json` returned.

        The source may be hostile: fields that no model could be built from, or that would take
        more memory than any real model, are rejected.

        Raises:
          InputError: an unknown, missing or impossible field or override.
        """
        if not isinstance(fields, dict):
            raise InputError(f"the model's description is {fields!r:.40}, expected a JSON object")
        for name in fields:
            if name not in _CHECKS:
                known = ", ".join(_CHECKS)
                raise InputError(f"the model's description has no field {name!r:.40}, only {known}")
        for field in dataclasses.fields(cls):
            if field.name not in fields and field.default is dataclasses.MISSING:
                raise InputError(f'the model\'s description lacks "{field.name}"')
        for name, value in fields.items():
            if not _CHECKS[name](value):
                raise InputError(f'the model\'s description has {value!r:.60} as "{name}"')
        names, classes = fields.get("class_names", ()), fields["num_classes"]
        if len(names) not in (0, classes):
            raise InputError(
                f"the model's description has {len(names)} class names for {classes} classes"
            )
        return cls(**fields)


def _integer(largest: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and 1 <= value <= largest


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e6


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _list(of: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        right = isinstance(value, list) and length in (None, len(value))
        return right and all(map(of, value))

    return check


def _override(pair: Any) -> bool:
    if not (_list(lambda _: True, 2)(pair) and isinstance(pair[0], str)):
        return False
    return pair[0] in _OVERRIDES and _OVERRIDES[pair[0]](pair[1])


# What each structural option may be, and what each field.
_OVERRIDES: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("patch_size", "embed_dim", "w0", "group_width", "stem_width"), _integer(8192)),
    **dict.fromkeys(("depth", "num_heads"), _integer(256)),
    **dict.fromkeys(("mlp_ratio", "wa", "wm", "se_ratio"), _positive),
    **dict.fromkeys(("distilled", "no_embed_class"), lambda value: isinstance(value, bool)),
    "layer_scale_init": lambda value: value is None or _number(value),
}
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "name": _text,
    "num_classes": _integer(2**24),
    "image_size": _integer(2**14),
    "class_names": _list(_text),
    "mean": _list(_number, 3),
    "std": _list(_positive, 3),
    "crop_ratio": lambda value: value is None or (_positive(value) and value <= 1),
    "interpolation": _text,
    "overrides": _list(_override),
    "source": _text,
    "weights": _text,
    "num_batches_tracked": _list(lambda value: type(value) is int and 0 <= value < 2**63),
}
