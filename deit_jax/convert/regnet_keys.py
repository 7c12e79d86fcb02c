"""How timm (and with it the reference) and torchvision name the tensors of RegNetY."""

import re

from deit_jax.convert.mapping import Layout

_TORCHVISION = (
    (r"stem\.conv\.(\w+)", r"stem.0.\1"),
    (r"stem\.bn\.(\w+)", r"stem.1.\1"),
    (r"s(\d+)\.b(\d+)\.conv1\.(conv|bn)\.(\w+)", r"{block}.f.a.{\3}.\4"),
    (r"s(\d+)\.b(\d+)\.conv2\.(conv|bn)\.(\w+)", r"{block}.f.b.{\3}.\4"),
    (r"s(\d+)\.b(\d+)\.conv3\.(conv|bn)\.(\w+)", r"{block}.f.c.{\3}.\4"),
    (r"s(\d+)\.b(\d+)\.se\.(fc[12])\.(\w+)", r"{block}.f.se.\3.\4"),
    (r"s(\d+)\.b(\d+)\.downsample\.(conv|bn)\.(\w+)", r"{block}.proj.{\3}.\4"),
    (r"head\.fc\.(\w+)", r"fc.\1"),
)


def _torchvision(timm_key: str) -> tuple[str, ...]:
    for pattern, replacement in _TORCHVISION:
        match = re.fullmatch(pattern, timm_key)
        if not match:
            continue
        key = match.expand(replacement).replace("{conv}", "0").replace("{bn}", "1")
        if "{block}" in key:
            stage, block = int(match[1]), int(match[2])  # torchvision counts blocks from 0
            key = key.replace("{block}", f"trunk_output.block{stage}.block{stage}-{block - 1}")
        return (key,)
    return (timm_key,)


TIMM = Layout("timm", "regnet", lambda key: (key,))
TORCHVISION = Layout("torchvision", "regnet", _torchvision)
