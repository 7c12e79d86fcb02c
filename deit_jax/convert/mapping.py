"""Moves tensors between a PyTorch file and our parameter tree, one by one, by name.

Our modules carry timm's names, so a leaf's timm key follows from its own name; `layouts` renames
it for the other files.
"""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from deit_jax import trees
from deit_jax.convert.layouts import Layout
from deit_jax.errors import InputError
from deit_jax.models.network import Variables

COUNTER = "num_batches_tracked"  # PyTorch's count of BatchNorm updates; no leaf of ours

_LAST_PART = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file: its key and shape, the leaf that it holds, and how they differ."""

    key: str
    shape: tuple[int, ...]
    leaf: str
    kind: str  # "same", "linear" (transposed), "pointwise" (a linear kept as 1×1 conv), "conv"
    part: tuple[int, int] = (0, 1)  # (i, n): the i-th of n equal parts of the leaf's last axis

    def from_leaf(self, leaf: np.ndarray) -> np.ndarray:
        """Returns the tensor, C-contiguous, cut from our leaf."""
        index, count = self.part
        width = leaf.shape[-1] // count
        part = np.asarray(leaf)[..., index * width : (index + 1) * width]
        if self.kind == "conv":  # HWIO → OIHW
            part = part.transpose(3, 2, 0, 1)
        elif self.kind != "same":
            part = part.T
        return np.ascontiguousarray(part.reshape(self.shape))

    def to_leaf(self, tensor: np.ndarray) -> np.ndarray:
        """Returns our leaf (or its part), a view where possible."""
        if self.kind == "conv":
            return tensor.transpose(2, 3, 1, 0)
        if self.kind == "same":
            return tensor
        return tensor.reshape(tensor.shape[:2]).T


def tensors_of(like: Variables, layout: Layout) -> list[Tensor]:
    """Lists the tensors, without counters, that a file of `layout` has for a model like `like`."""
    result = []
    for name, leaf in trees.flat(like).items():
        result += _tensors_of_leaf(name, tuple(leaf.shape), layout)
    return result


def _tensors_of_leaf(leaf: str, shape: tuple[int, ...], layout: Layout) -> list[Tensor]:
    _, *path, last = leaf.split("/")
    kind = "same"
    if last == "kernel":
        if len(shape) == 4:
            kind, shape = "conv", (shape[3], shape[2], shape[0], shape[1])
        elif "se" in path:
            kind, shape = "pointwise", (shape[1], shape[0], 1, 1)
        else:
            kind, shape = "linear", shape[::-1]
    keys = layout.rename(".".join([*path, _LAST_PART.get(last, last)]))
    if len(keys) > 1:
        shape = (shape[0] // len(keys), *shape[1:])
    elif layout.rows and keys[0].endswith(layout.rows):
        shape = (1, 1, *shape)
    elif keys == ("freqs",):  # the reference has the frequencies of all heads in one axis
        shape = (*shape[:2], shape[2] * shape[3])
    return [Tensor(key, shape, leaf, kind, (i, len(keys))) for i, key in enumerate(keys)]


def counters_of(like: Variables, layout: Layout) -> list[str]:
    """Lists the keys of PyTorch's BatchNorm counters in a file, sorted by timm's names."""
    means = [name for name in trees.flat(like.batch_stats) if name.endswith("/mean")]
    timm_keys = [name.removesuffix("mean").replace("/", ".") + COUNTER for name in sorted(means)]
    return [layout.key(key) for key in timm_keys]


def to_variables(
    tensors: Mapping[str, np.ndarray], like: Variables, layout: Layout, *, what: str
) -> tuple[Variables, tuple[int, ...]]:
    """Reads a file's tensors into a tree shaped as `like`.

    Args:
      tensors: float32 arrays by the keys of `layout`, and possibly counters.
      like: shapes of the model's variables.
      layout: how the file names its tensors.
      what: names the file in errors.

    Returns:
      The variables (views of `tensors` where possible), and the counters: () where there are none
      or all are 0, one number where all agree, else one per BatchNorm layer.

    Raises:
      InputError: a tensor is missing, superfluous or of another shape; lists the differences.
    """
    wanted = tensors_of(like, layout)
    counter_keys = counters_of(like, layout)
    counters = {key: tensors[key] for key in counter_keys if key in tensors}
    for key, counter in counters.items():
        if counter.dtype != np.int64 or counter.size != 1:
            raise InputError(
                f"{what}: {key} is {counter.dtype} {counter.shape}, expected one int64 number"
            )
    if len(counters) not in (0, len(counter_keys)):
        raise InputError(
            f"{what}: {len(counters)} {COUNTER} for {len(counter_keys)} BatchNorm layers, expected "
            "all or none; the file is not a whole state dict"
        )
    skip = set(counter_keys)
    given = {key: tensor for key, tensor in tensors.items() if key not in skip}
    expected = {tensor.key: jax.ShapeDtypeStruct(tensor.shape, np.float32) for tensor in wanted}
    trees.check_like(given, expected, f"{what} ({layout.name} names): its tensors")

    parts: dict[str, list[np.ndarray]] = {}
    for tensor in wanted:
        parts.setdefault(tensor.leaf, []).append(tensor.to_leaf(given[tensor.key]))
    leaves = [
        (arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)).reshape(leaf.shape)
        for arrays, leaf in zip(parts.values(), jax.tree.leaves(like), strict=True)
    ]
    tree = jax.tree.unflatten(jax.tree.structure(like), leaves)  # in the order of `tensors_of`
    variables = Variables(
        trees.in_order_of(tree.params, like.params),
        trees.in_order_of(tree.batch_stats, like.batch_stats),
    )
    counts = tuple(int(counter.item()) for counter in counters.values())
    if len(set(counts)) <= 1:
        counts = counts[:1] if any(counts) else ()
    return variables, counts


def from_variables(
    variables: Variables, layout: Layout, *, num_batches_tracked: tuple[int, ...] = ()
) -> dict[str, np.ndarray]:
    """Returns the tensors of a file of `layout`, with the counters that `to_variables` returned.

    Raises:
      InputError: the number of counters is neither one nor that of the BatchNorm layers.
    """
    leaves = trees.flat(variables)
    tensors = {t.key: t.from_leaf(leaves[t.leaf]) for t in tensors_of(variables, layout)}
    counter_keys = counters_of(variables, layout)
    counts = num_batches_tracked or (0,)
    if len(counts) == 1:
        counts = counts * len(counter_keys)
    if len(counts) != len(counter_keys):
        raise InputError(
            f"the model's description has {len(counts)} {COUNTER}, expected one or "
            f"{len(counter_keys)}: one for each BatchNorm layer"
        )
    return tensors | {
        key: np.asarray(count, np.int64) for key, count in zip(counter_keys, counts, strict=True)
    }


def check_finite(tensors: Mapping[str, np.ndarray], what: str, *, allow: bool) -> list[str]:
    """Looks for NaN and infinity.

    Returns:
      With `allow`, a note about each tensor that has some.

    Raises:
      InputError: without `allow`, about the first one.
    """
    notes = []
    for name, array in tensors.items():
        if bad := array.size - np.count_nonzero(np.isfinite(array)):
            notes.append(f"{name} has {bad} values that are not finite, of {array.size}")
            if not allow:
                raise InputError(
                    f"{what}: {notes[0]}; the training run diverged, or the file is damaged; "
                    "--allow_nonfinite (in Python, allow_nonfinite=True) takes them as they are"
                )
    return notes
