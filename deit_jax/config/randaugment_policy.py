"""Reads RandAugment policies, which are strings as timm writes them."""

import dataclasses
import math
import re

from deit_jax.errors import InputError

# In timm's order: a draw is an index of it.
OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color",
    "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
)  # fmt: skip

# Of each part: its field, and the type, minimum and maximum of its number.
_PARTS = {
    "n": ("num_ops", int, 1, 100),
    "m": ("magnitude", int, 0, 1000),
    "mstd": ("magnitude_std", float, 0, math.inf),
    "mmax": ("magnitude_max", int, 1, 1000),
    "p": ("probability", float, 0, 1),
    "inc": ("increasing", int, 0, 1000),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Draws one of OPERATIONS `num_ops` times, and applies each with `probability`.

    Its level is normal around `magnitude`, clipped to [0, `magnitude_max`]; where `magnitude_std`
    is infinite it is uniform in [0, `magnitude`].
    """

    num_ops: int = 2
    magnitude: int = 10
    magnitude_std: float = 0.0
    magnitude_max: int = 10
    probability: float = 0.5
    increasing: bool = False  # every operation changes the image more at a higher level


def parse_policy(text: str) -> Policy:
    """Reads a string such as "rand-m9-mstd0.5-inc1"; parts left out have timm's defaults.

    Meanings are those of timm 1.0.31: inc0 is off, and mstd above 100 stands for uniform levels.
    (timm 0.3.2, of the published DeiT runs, takes any digit of inc for on; those say inc1.)

    Raises:
      InputError: a part is unknown, malformed, out of range or given twice. timm ignores some of
        these, such as "inc" without a digit.
    """
    name, *parts = text.split("-")
    if name != "rand":
        raise InputError(
            f"policy {text!r} begins with {name!r}, but only RandAugment is known; write it as "
            "rand-m9-mstd0.5-inc1"
        )
    fields = {}
    for part in parts:
        letters, number = re.fullmatch(r"([a-z]*)(.*)", part, re.DOTALL).groups()
        field, kind, low, high = _PARTS.get(letters, ("", int, 0, 0))
        digits = r"\d+" if kind is int else r"\d+\.?\d*|\.\d+"
        valid = field and re.fullmatch(digits, number, re.ASCII) and low <= kind(number) <= high
        if not valid:
            known = (f"{name} {low}..{high}" for name, (_, _, low, high) in _PARTS.items())
            raise InputError(
                f"policy {text!r} has the part {part!r}, expected a number behind one of: "
                f"{', '.join(known)} (whole but for mstd and p), as in rand-m9-mstd0.5-inc1"
            )
        if field in fields:
            raise InputError(f"policy {text!r} has the part {letters!r} twice; remove one of them")
        fields[field] = kind(number)
    if fields.get("magnitude_std", 0) > 100:
        fields["magnitude_std"] = math.inf
    return Policy(**fields | {"increasing": bool(fields.get("increasing", False))})
