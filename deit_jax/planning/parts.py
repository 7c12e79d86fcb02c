"""Says of which part of a training step an operation of the compiled program is."""

import re

MOVING = {"copy", "transpose", "reshape", "reverse", "concatenate"}
_NAME = re.compile(r'\bop_name="([^"]*)"')
_PARTS = {  # by the scope in an operation's name; the first match counts
    "teacher": r"/teacher/|\(teacher\)",
    "augmentation": r"/augment/",
    "optimiser, EMA, guard": r"/(?:optimizer|ema|guard)/|^jit\(train_step\)/\w+$",
    "attention": r"/attn/",
    "MLP": r"/mlp(?:_channels)?/|/linear_tokens/",
    "norms": r"/norm\d?/",
    "residual stream": r"/blocks(?:_token_only)?/\d+/(?:drop_path/|ls\d/|\w+$)",
    "embedding": r"/patch_embed/|/pos_embed",
    "heads and loss": r"/head(?:_dist)?/|\(loss\)|/loss/",
}


def scope(line: str) -> str:
    """Returns the name that JAX gave the operation of a line, "" where it has none."""
    match = _NAME.search(line)
    return match[1] if match else ""


def part_of(scope: str, moves: bool) -> str:
    """Returns the part of a step in words.

    Args:
      scope: what `scope` returned.
      moves: whether the operation does nothing but move data.
    """
    part = next((part for part, where in _PARTS.items() if re.search(where, scope)), "other")
    return "moving data" if moves and part != "teacher" else part


def is_backward(scope: str) -> bool:
    """Returns whether an operation is of the backward pass."""
    return "transpose(" in scope
