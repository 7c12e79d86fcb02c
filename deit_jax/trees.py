"""Trees of arrays by the names of their leaves: checks, masks and digests.

A leaf's name joins its keys with slashes: `blocks/0/attn/qkv/kernel`. Flax matches trees to modules
by sorted position and checks neither name nor shape, so every tree that comes from outside passes
`check_like` before it meets a model.
"""

import hashlib
import math
import re
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from deit_jax.errors import InputError

_MAX_LISTED = 10


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flat(tree: Any) -> dict[str, Any]:
    """Returns {name: leaf} in the order in which JAX flattens the tree."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def leaf_names(tree: Any) -> list[str]:
    """Returns the leaves' names in the order in which JAX flattens the tree."""
    return [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def in_order_of(tree: Any, like: Any) -> Any:
    """Returns `tree` with its keys in the order of `like`, as `nnx.merge` expects them."""
    if isinstance(like, dict):
        return {key: in_order_of(tree[key], value) for key, value in like.items()}
    return tree


def param_count(tree: Any) -> int:
    """Returns the number of elements in all leaves (arrays or `jax.ShapeDtypeStruct`)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def name_mask(tree: Any, patterns: Iterable[str]) -> Any:
    """Returns a tree of bools: True where one of the regular expressions matches the whole name."""
    compiled = [re.compile(pattern) for pattern in patterns]
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(pattern.fullmatch(_name(path)) for pattern in compiled), tree
    )


def select(tree: Any, mask: Any) -> dict[str, Any]:
    """Returns {name: leaf} of the leaves where `mask`, a tree of bools like `tree`, is True."""
    chosen = jax.tree.leaves(mask)
    return {
        name: leaf for (name, leaf), take in zip(flat(tree).items(), chosen, strict=True) if take
    }


def check_like(got: Any, want: Any, what: str = "parameters") -> None:
    """Raises InputError unless `got` has exactly the names, key types and shapes of `want`.

    `what` says in the message which tree was wrong, for instance the file it came from. dtypes
    are not compared: loaders cast.
    """
    got_leaves, want_leaves = flat(got), flat(want)
    problems = [f"missing {name}" for name in want_leaves if name not in got_leaves]
    problems += [f"unexpected {name}" for name in got_leaves if name not in want_leaves]
    for name, leaf in want_leaves.items():
        if name in got_leaves and (found := tuple(got_leaves[name].shape)) != tuple(leaf.shape):
            problems.append(f"{name} has shape {found}, expected {tuple(leaf.shape)}")
    if problems:
        listed = "; ".join(problems[:_MAX_LISTED])
        more = len(problems) - _MAX_LISTED
        tail = f"; and {more} more" if more > 0 else ""
        raise InputError(
            f"{what} do not match the model ({len(got_leaves)} leaves, expected "
            f"{len(want_leaves)}): {listed}{tail}. Check the model's name, number of classes and "
            "image size"
        )
    # "0" and 0 print alike, but string keys sort 0, 1, 10, 2 and would permute the blocks.
    if jax.tree.structure(got) != jax.tree.structure(want):
        raise InputError(
            f"{what} have the model's names but other key or container types; integer keys that "
            "were read back as strings need nnx.restore_int_paths first"
        )


def digest(*parts: object) -> str:
    """Returns 16 hex digits of a hash of strings and arrays, in their order."""
    whole = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, str) else np.asarray(part)
        whole.update(content.encode() if isinstance(content, str) else content.tobytes())
        whole.update(b"\0")
    return whole.hexdigest()[:16]
