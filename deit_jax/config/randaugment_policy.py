"""RandAugment policies: their strings, as timm writes them, and the operations they name."""

import dataclasses
import math
import re

from deit_jax.errors import InputError

# In timm's order, which the index of a drawn operation refers to.
OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color",
    "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
)  # fmt: skip

_KNOWN = "n, m, mstd, mmax, p and inc, each with a number"
# Of each part: its field, what its number has to be, and the smallest and largest one.
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
    """`num_ops` times: draw one of OPERATIONS, apply it with `probability`, at a random level.

    The level is drawn from a normal distribution around `magnitude` and clipped to
    [0, `magnitude_max`]; where `magnitude_std` is infinite it is uniform in [0, `magnitude`].
    """

    num_ops: int = 2
    magnitude: int = 10
    magnitude_std: float = 0.0
    magnitude_max: int = 10
    probability: float = 0.5
    increasing: bool = False  # every operation changes the image more at a higher level


def parse_policy(text: str) -> Policy:
    """Reads a string such as "rand-m9-mstd0.5-inc1"; parts left out have timm's defaults.

    Meanings are those of timm 1.0.31: inc0 is off (in timm 0.3.2, of the published DeiT runs, any
    digit was on: its runs say inc1), and mstd above 100 stands for uniform levels.

    Raises:
      InputError: a part that is unknown, malformed, out of range or given twice. timm ignores some
        of these, such as "inc" without a digit; here nothing is ignored.
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
        if letters not in _PARTS:
            raise InputError(
                f"policy {text!r} has the part {part!r}, which is unknown; known are {_KNOWN}, "
                "as in rand-m9-mstd0.5-inc1"
            )
        field, kind, low, high = _PARTS[letters]
        if field in fields:
            raise InputError(f"policy {text!r} has the part {letters!r} twice; remove one of them")
        whole, digits = kind is int, r"\d+" if kind is int else r"\d+\.?\d*|\.\d+"
        if not re.fullmatch(digits, number, re.ASCII) or not low <= kind(number) <= high:
            expected = "a whole number" if whole else "a number"
            span = f"of at least {low}" if high == math.inf else f"in {low}..{high}"
            raise InputError(
                f"policy {text!r} has the part {part!r}, but {letters!r} needs {expected} {span} "
                f"after it; known are {_KNOWN}, as in rand-m9-mstd0.5-inc1"
            )
        fields[field] = kind(number)
    if fields.get("magnitude_std", 0) > 100:
        fields["magnitude_std"] = math.inf
    return Policy(**fields | {"increasing": bool(fields.get("increasing", False))})
