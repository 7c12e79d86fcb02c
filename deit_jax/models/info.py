"""Describes a model: what travels with its weights in `model.json` and in converted files."""

import ast
import contextlib
import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from deit_jax.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """Everything needed to predict with a model besides its weights; `model.json` holds it.

    A `crop_ratio` of None means that evaluation resizes the whole image and crops nothing.
    `overrides` holds the structural options that were chosen at creation, as (option, value) pairs
    sorted by option; what is not there is the registry's. `source` says where the weights come
    from, `weights` which: "raw" or "ema". `num_batches_tracked` is PyTorch's count of updates of
    each BatchNorm layer, kept for the way back: sorted by the layers' names, or one number where
    all agree. An `image_size` is a side, or (height, width) where they differ.
    """

    name: str
    num_classes: int
    image_size: int | tuple[int, int]
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
        """Takes NumPy's numbers and arrays and any sequences, and keeps what JSON gives back.

        Raises:
          InputError: a field or an override that no model could have.
        """
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, checked(name, getattr(self, name), check))
        if isinstance(self.image_size, tuple) and len(set(self.image_size)) == 1:
            object.__setattr__(self, "image_size", self.image_size[0])
        for option, value in self.overrides:
            checked(option, value)
        names, classes = self.class_names, self.num_classes
        if len(names) not in (0, classes):
            raise InputError(f"there are {len(names)} class names for {classes} classes")

    @property
    def side(self) -> int:
        """Returns the side of the images.

        Raises:
          InputError: they are not square, which most commands expect.
        """
        if isinstance(self.image_size, tuple):
            raise InputError(
                f"images of {self.name} are {self.image_size}, height and width; only square ones "
                "can be prepared, trained and exported: use model(images) from Python"
            )
        return self.image_size

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
        return cls(**fields)


class Check(NamedTuple):
    """What a value may be: the test of it, and in words."""

    passes: Callable[[Any], bool]
    expected: str


def checked(name: str, value: Any, check: Check | None = None) -> Any:
    """Returns a field or an option as JSON gives it back, but for tuples.

    Args:
      name: of the field or the structural option.
      value: its value; also of NumPy's types.
      check: what it may be; by default that of the option.

    Raises:
      InputError: the value is not what it may be.
    """
    check = check or _OPTIONS.get(name)
    if check is None:
        raise InputError(f"{name!r:.40} is not a structural option, only {', '.join(_OPTIONS)}")
    value = _plain(value)
    if not check.passes(value):
        raise InputError(f"{name} is {value!r:.60}, expected {check.expected}")
    return value


def parse_options(text: str) -> dict[str, Any]:
    """Reads structural options as a config has them: "rope=mixed num_registers=4".

    Raises:
      InputError: not NAME=VALUE, no such option, or a value that it cannot have.
    """
    options = {}
    for word in text.split():
        name, equals, value = word.partition("=")
        if not equals:
            raise InputError(f"config.model.options: {word!r} is not NAME=VALUE, as in rope=mixed")
        if name == "patch_size":
            raise InputError("config.model.options: patch_size is config.model.patch_size")
        with contextlib.suppress(ValueError, SyntaxError):  # a text without quotes
            value = ast.literal_eval(value)
        options[name] = checked(name, value)
    return options


def format_options(options: dict[str, Any]) -> str:
    """Returns structural options as `parse_options` reads them."""
    texts = {
        name: value if isinstance(value, str) else repr(value) for name, value in options.items()
    }
    return " ".join(f"{name}={''.join(text.split())}" for name, text in texts.items())


def _plain(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def _integer(largest: int, least: int = 1) -> Check:
    return Check(
        lambda value: type(value) is int and least <= value <= largest,
        f"a whole number from {least} to {largest}",
    )


def number(passes: Callable[[float], bool], expected: str) -> Check:
    """Returns a check of a finite number that is not huge, and that passes another one."""

    def check(value: Any) -> bool:
        usable = type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e6
        return usable and passes(value)

    return Check(check, expected)


def one_of(*values: str) -> Check:
    """Returns a check of a text that is one of these."""
    *some, last = (f'"{value}"' for value in values)
    return Check(lambda value: value in values, f"{', '.join(some)} or {last}")


def _or_none(check: Check) -> Check:
    return Check(lambda value: value is None or check.passes(value), f"{check.expected}, or None")


def _tuple(of: Check, length: int | None = None) -> Check:
    def check(value: Any) -> bool:
        right = isinstance(value, tuple) and length in (None, len(value))
        return right and all(map(of.passes, value))

    return Check(
        check, f"a list of {'any length' if length is None else length}, each {of.expected}"
    )


_ANY = number(lambda _: True, "a finite number")
_POSITIVE = number(lambda value: value > 0, "a finite number above 0")
_TEXT = Check(
    # Surrogates stand for bytes of a file's name that are no UTF-8, and cannot be written.
    lambda value: isinstance(value, str) and value == value.encode("utf-8", "ignore").decode(),
    "a text that UTF-8 can encode",
)
BOOL = Check(lambda value: isinstance(value, bool), "True or False")
_SIDE = _integer(2**14)
_SIZE = Check(
    lambda value: _SIDE.passes(value) or _tuple(_SIDE, 2).passes(value),
    f"{_SIDE.expected}, or two of them (height and width)",
)
_PAIR = Check(
    lambda pair: isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str),
    "an option and its value",
)

# What each structural option may be, and what each field.
_OPTIONS: dict[str, Check] = {
    **dict.fromkeys(("patch_size", "embed_dim", "w0", "group_width", "stem_width"), _integer(8192)),
    **dict.fromkeys(("depth", "depth_token_only", "num_heads"), _integer(256)),
    **dict.fromkeys(("mlp_ratio", "se_ratio"), _POSITIVE),
    **dict.fromkeys(("distilled", "no_embed_class", "pos_embed", "hmlp"), BOOL),
    **dict.fromkeys(("qk_norm", "qkv_bias", "linear_bias"), BOOL),
    "num_registers": _integer(256, least=0),
    "norm": one_of("layer", "rms"),
    "rope": one_of("none", "axial", "mixed", "vit5"),
    "wa": number(lambda value: value >= 0, "a finite number of at least 0"),
    "wm": number(lambda value: value > 1, "a finite number above 1"),
    "layer_scale_init": _or_none(_ANY),
}
_CHECKS: dict[str, Check] = {
    "name": _TEXT,
    "num_classes": _integer(2**24, least=0),
    "image_size": _SIZE,
    "class_names": _tuple(_TEXT),
    "mean": _tuple(_ANY, 3),
    "std": _tuple(_POSITIVE, 3),
    "crop_ratio": _or_none(number(lambda value: 0 < value <= 1, "a number above 0 and up to 1")),
    "interpolation": _TEXT,
    "overrides": _tuple(_PAIR),
    "source": _TEXT,
    "weights": _TEXT,
    "num_batches_tracked": _tuple(_integer(2**63 - 1, least=0)),
}
