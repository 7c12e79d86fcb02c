"""Imports torchvision next to a torch build that cannot load torchvision's compiled operators.

torchvision registers fake kernels for two of its C++ operators at import and fails when their
schemas are unknown. Declaring the schemas is enough: the oracles call neither operator. Where the
compiled operators do load they declare themselves, and a second declaration would end the process.
"""

import contextlib
import functools
import importlib.util
from pathlib import Path

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


@functools.cache
def import_torchvision():
    """Returns the torchvision module; afterwards `import timm` and `import torchvision` work."""
    with contextlib.suppress(OSError):  # a build for another torch or for a GPU
        for library in Path(importlib.util.find_spec("torchvision").origin).parent.glob("_C*.so"):
            torch.ops.load_library(library)
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", _SCHEMA)
    import torchvision
    import torchvision.transforms

    return torchvision
