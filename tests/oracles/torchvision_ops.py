"""Imports torchvision next to a torch build that lacks torchvision's compiled operators.

torchvision registers fake kernels for two of its C++ operators at import and fails when their
schemas are unknown. Declaring the schemas is enough: the oracles call neither operator.
"""

import functools

import torch

_SCHEMAS = (
    ("nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
    ("qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
)


@functools.cache
def import_torchvision():
    """Return the torchvision module; afterwards `import timm` and `import torchvision` work."""
    for name, schema in _SCHEMAS:
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", schema)
    import torchvision
    import torchvision.transforms

    return torchvision
