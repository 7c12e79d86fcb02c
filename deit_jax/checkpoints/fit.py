"""Makes the weights of one model fit another's shapes: other images, classes or tokens.

Fine-tuning starts here: at 384 pixels from 224, on a small data set from ImageNet, with a
distillation token from a model without one.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from deit_jax import folders, trees
from deit_jax.errors import InputError
from deit_jax.models import positions, registry
from deit_jax.models.info import ModelInfo
from deit_jax.models.network import Tree, Variables

KERNELS = ("reference", "timm")
_DISTILLATION = ("dist_token", "head_dist")
_HEADS = ("head", "head_dist")
_ROW = "row 1 of pos_embed"  # the distillation token's


class _Rows(NamedTuple):
    """What the rows of pos_embed belong to: 0, 1 or 2 tokens, then the patches of a grid (h, w)."""

    prefix: int
    grid: tuple[int, int]


def resize_pos_embed(
    pos_embed: np.ndarray,
    *,
    grid: tuple[int, int],
    num_prefix: int,
    old_grid: tuple[int, int] | None = None,
    kernel: str = "reference",
) -> np.ndarray:
    """Resamples position embeddings to another grid of patches.

    Args:
      pos_embed: [1, num_prefix + h·w, D], patches row by row.
      grid: (H, W), rows and columns of patches wanted.
      num_prefix: leading rows, of class and distillation tokens, that are kept as they are.
      old_grid: (h, w); None for a square one.
      kernel: "reference", as DeiT's reference and Hugging Face do: PyTorch's bicubic, a = -0.75,
        borders repeated, no antialiasing; or "timm": PyTorch's antialiased bicubic, a = -0.5. The
        results differ by several percent even where the grid grows.

    Returns:
      float32 [1, num_prefix + H·W, D]; the same bits where the grid stays.

    Raises:
      InputError: an unknown kernel, or rows that do not fit the grid.
    """
    if kernel not in KERNELS:
        raise InputError(f'kernel is "{kernel}", expected {" or ".join(KERNELS)}')
    pos_embed = np.asarray(pos_embed).astype(np.float32)
    if pos_embed.ndim != 3 or len(pos_embed) != 1 or pos_embed.shape[1] <= num_prefix:
        raise InputError(
            f"position embeddings have shape {pos_embed.shape}, expected [1, {num_prefix} + "
            "patches, width]"
        )
    patches = pos_embed.shape[1] - num_prefix
    if old_grid is None:
        old_grid = (round(patches**0.5),) * 2
    (h, w), (new_h, new_w) = old_grid, grid
    if h * w != patches or min(h, w, new_h, new_w) < 1:
        raise InputError(
            f"cannot resize {patches} position embeddings (after {num_prefix} prefix rows) from "
            f"{h}×{w} to {new_h}×{new_w} patches; check num_prefix, and give old_grid=(rows, "
            "columns) unless it is square"
        )
    if (h, w) == (new_h, new_w):
        return pos_embed

    field = pos_embed[0, num_prefix:].astype(np.float64).reshape(h, w, -1)
    weights = positions.clamped_weights if kernel == "reference" else positions.antialiased_weights
    field = np.einsum("Hh,Ww,hwd->HWd", weights(h, new_h), weights(w, new_w), field, optimize=True)
    field = field.reshape(1, new_h * new_w, -1).astype(np.float32)
    return np.concatenate([pos_embed[:, :num_prefix], field], axis=1)


def fit(
    variables: Variables,
    info: ModelInfo,
    like: Variables,
    target: ModelInfo,
    *,
    fresh: Callable[[], Variables] | None = None,
    kernel: str = "reference",
) -> tuple[Variables, list[str]]:
    """Makes weights fit a model of the same body: other image size, classes or distillation token.

    Position embeddings are resampled to the target's patches. Heads are replaced by fresh ones
    where the number of classes differs, or their names do. A distillation token, its head and its
    position are dropped or newly initialised where one of the models has none. All else must agree
    in name and shape and is passed on as it is, batch statistics included. Leaves may be
    shapes without values (`jax.ShapeDtypeStruct`), to learn beforehand what would be done.

    Args:
      variables: the weights at hand.
      info: the model that they are of.
      like: the target's shapes.
      target: the model wanted.
      fresh: returns the target's own initialisation; called only where something is new.
      kernel: see `resize_pos_embed`.

    Returns:
      Variables with the shapes and the key order of `like`, and the changes: one line for each
      thing resized, dropped or newly initialised; none for equal models.

    Raises:
      InputError: the models differ in something else, or something new is needed without `fresh`.
    """
    what = f"weights of {info.name}, to be fitted to {target.name},"
    old, want = variables.params, like.params
    _check_patches(info, target, what)
    try:
        _check_body(variables, like, what)
    except InputError as error:
        if info.name == target.name:
            raise
        raise InputError(
            f"these are weights of {info.name}, but the model asked for is {target.name}; set "
            f"--config.model.name={info.name}, or empty for that of the weights (in convert: leave "
            "out --model)"
        ) from error
    changes, new = [], {}  # new: what to initialise, and why
    plain = f"{info.name} is not distilled"
    if why := _other_classes(old, info, want, target):
        added = [name for name in _HEADS if name in want and (name in old or "head" not in old)]
        new = dict.fromkeys(added, why)
    new |= {name: plain for name in _DISTILLATION if name in want and name not in {*old, *new}}
    dropped = [name for name in _DISTILLATION if name in old and name not in want]
    if "head" in old and "head" not in want:
        heads = [name for name in _HEADS if name in old]
        dropped = [name for name in dropped if name not in heads]
        changes.append(f"{', '.join(heads)} dropped: {target.name} is to have no classes")
    _check_unseen(info, target)
    if "pos_embed" in want:
        have, wanted = _rows(old, info), _rows(want, target)
        if (have.prefix == 0) != (wanted.prefix == 0):
            whose = ["all tokens" if each.prefix else "patches only" for each in (have, wanted)]
            raise InputError(
                f"{what} have position embeddings for {whose[0]}, but {target.name} has them for "
                f"{whose[1]}; start from a model with the same no_embed_class"
            )
        if have.grid != wanted.grid:
            grids = f"{_times(have.grid)} to {_times(wanted.grid)} patches"
            changes.append(f"pos_embed resized from {grids}, {kernel} kernel")
        if have.prefix > wanted.prefix:
            dropped.append(_ROW)
        if have.prefix < wanted.prefix:
            new[_ROW] = plain

    if dropped:
        changes.append(f"{', '.join(dropped)} dropped: {target.name} is not distilled")
    changes += [f"{name} newly initialised: {why}" for name, why in new.items()]
    initial = {}
    if new:
        if fresh is None:
            lacking = "; ".join(f"{name} ({why})" for name, why in new.items())
            raise InputError(
                f"{what} lack {lacking}: pass fresh, an initialisation of {target.name}, or choose "
                "a target that needs nothing new"
            )
        initial = fresh().params
        trees.check_like(initial, want, f"fresh parameters of {target.name}")

    params = {name: (initial if name in new else old)[name] for name in want}
    if "pos_embed" in want and have != wanted:
        row = initial["pos_embed"] if _ROW in new else None
        params["pos_embed"] = _fit_rows(old["pos_embed"], row, have, wanted, kernel)
    trees.check_like(params, want, what)
    stats = trees.in_order_of(variables.batch_stats, like.batch_stats)
    return Variables(trees.in_order_of(params, want), stats), changes


def _check_patches(info: ModelInfo, target: ModelInfo, what: str) -> None:
    """Raises InputError for ResMLP, whose layers over the patches are of one image size."""
    families = {registry.family(each.name) for each in (info, target)}
    if families == {"resmlp"} and info.image_size != target.image_size:
        sizes = [_times(np.broadcast_to(each.image_size, 2)) for each in (info, target)]
        raise InputError(
            f"{what} mix the patches of {sizes[0]} pixels, and no others: ResMLP cannot change to "
            f"{sizes[1]}; set the image size to {sizes[0]}"
        )


def _check_body(variables: Variables, like: Variables, what: str) -> None:
    """Raises InputError unless the models agree in all that `fit` cannot adapt."""
    old, want = variables.params, like.params
    body = {
        name: want.get(name, leaf) if name in ("pos_embed", "head") else leaf
        for name, leaf in old.items()
        if name not in _DISTILLATION
    }
    body |= {name: want[name] for name in (*_DISTILLATION, "head") if name in want}
    if "head" not in want:
        body.pop("head", None)
    trees.check_like(
        {"params": body, "batch_stats": variables.batch_stats},
        {"params": want, "batch_stats": like.batch_stats},
        what,
    )


def _check_unseen(info: ModelInfo, target: ModelInfo) -> None:
    """Compares what no shape tells but the weights depend on: heads and rotary positions."""
    have, want = registry.options(info), registry.options(target)
    if have.get("num_heads") != want.get("num_heads"):
        raise InputError(
            f"weights of {info.name} have {have['num_heads']} attention heads, but {target.name} "
            f"has {want['num_heads']}; set its num_heads to {have['num_heads']}"
        )
    if have.get("rope") != want.get("rope"):
        raise InputError(
            f'weights of {info.name} are made for rope "{have["rope"]}", but {target.name} has '
            f'rope "{want["rope"]}"; choose a target with the same'
        )


def _other_classes(old: Tree, info: ModelInfo, want: Tree, target: ModelInfo) -> str | None:
    """Returns why the heads do not serve the target, or None."""
    # RegNetY's head pools before its linear layer `fc`.
    heads = [params.get("head", {}) for params in (old, want)]
    heads = [head.get("fc", head) for head in heads]
    have, wanted = (head["kernel"].shape[-1] if head else 0 for head in heads)
    if have != wanted:
        return f"{wanted} classes, where {info.name} has {have}"
    if other := folders.first_other(info.class_names, target.class_names):
        _, name, now = other
        return f"{wanted} classes as before, but other ones: {name!r} is now {now!r}"
    return None


def _rows(params: Tree, info: ModelInfo) -> _Rows:
    patch = registry.options(info)["patch_size"]
    size = tuple(int(side) for side in np.broadcast_to(info.image_size, 2))
    grid = size[0] // patch, size[1] // patch
    tokens = 2 if "dist_token" in params else 1
    rows = params["pos_embed"].shape[1]
    prefix = rows - grid[0] * grid[1]
    if prefix not in (0, tokens):
        raise InputError(
            f"pos_embed of {info.name} has {rows} rows, but {_times(size)} pixels are "
            f"{_times(grid)} patches, with {tokens} or no rows before them; check image_size"
        )
    return _Rows(prefix, grid)


def _fit_rows(
    pos_embed: np.ndarray, fresh: np.ndarray | None, have: _Rows, wanted: _Rows, kernel: str
) -> np.ndarray | jax.ShapeDtypeStruct:
    """Resizes position embeddings; drops the distillation token's row, or takes it from `fresh`."""
    if not all(hasattr(leaf, "__array__") for leaf in (pos_embed, fresh) if leaf is not None):
        rows = wanted.prefix + wanted.grid[0] * wanted.grid[1]
        return jax.ShapeDtypeStruct((1, rows, pos_embed.shape[2]), np.float32)
    rows = resize_pos_embed(
        pos_embed, grid=wanted.grid, num_prefix=have.prefix, old_grid=have.grid, kernel=kernel
    )
    if have.prefix > wanted.prefix:
        return np.delete(rows, 1, axis=1)
    if have.prefix < wanted.prefix:
        return np.concatenate([rows[:, :1], np.asarray(fresh)[:, 1:2], rows[:, 1:]], axis=1)
    return rows


def _times(pair: tuple[int, int]) -> str:
    return f"{pair[0]}×{pair[1]}"
