"""Task losses: what a training step minimises, image by image, as a function of the heads' logits.

Three functions with one signature. Args: `heads`, the logits of each head, [B,K]; `targets`, the
mixed and smoothed labels, [B,K]; `teacher_logits`, [B,K] or None; `config`, the recipe. Returns:
the loss [B], and its unweighted parts and other statistics [B] by name; all float32.

Every one of them trains every head: a model predicts with the mean of all its heads.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from deit_jax.errors import InputError
from deit_jax.training import losses

if TYPE_CHECKING:  # the step runs without ml_collections, which GPU hosts may lack
    from ml_collections import ConfigDict

Heads = tuple[jax.Array, ...]
LossAndParts = tuple[jax.Array, dict[str, jax.Array]]
Task = Callable[[Heads, jax.Array, jax.Array | None, "ConfigDict"], LossAndParts]


def choose_task(config: "ConfigDict") -> Task:
    """Returns the task loss of a recipe."""
    if config.train.cosub:
        return cosub
    return plain if config.distill.kind == "none" else distillation


def plain(
    heads: Heads, targets: jax.Array, teacher_logits: jax.Array | None, config: "ConfigDict"
) -> LossAndParts:
    """Returns the loss of the mean of the heads' logits with the labels.

    Both heads of a distilled model learn from the labels, as in timm; the reference would leave the
    second one as it is, and its decay would go on.
    """
    base = losses.BASE_LOSSES[config.train.loss](sum(heads) / len(heads), targets)
    return base, {"base": base}


def distillation(
    heads: Heads, targets: jax.Array, teacher_logits: jax.Array | None, config: "ConfigDict"
) -> LossAndParts:
    """Returns (1 - α)·base + α·distill (DeiT, arXiv 2012.12877, section 3).

    The class head learns from the labels and the distillation head from the teacher; an only head
    learns from both (the same, table 3).

    Raises:
      InputError: the kind is unknown, or there is no teacher.
    """
    kind, alpha = config.distill.kind, config.distill.alpha
    if kind not in ("hard", "soft"):
        raise InputError(f"distill.kind is {kind!r}: expected none, hard or soft")
    if teacher_logits is None:
        raise InputError(f"distill.kind is {kind!r} but there is no teacher: set distill.teacher")
    taught = heads[-1]
    base, parts = plain(heads[:1], targets, None, config)
    if kind == "hard":
        distill = losses.hard_distillation(taught, teacher_logits)
    else:
        options = {"temperature": config.distill.temperature, "reduction": config.distill.reduction}
        distill = losses.soft_distillation(taught, teacher_logits, **options)
    agrees = taught.argmax(-1) == teacher_logits.argmax(-1)
    parts |= {"distill": distill, "teacher_agreement": agrees.astype(jnp.float32)}
    return (1.0 - alpha) * base + alpha * distill, parts


def cosub(
    heads: Heads, targets: jax.Array, teacher_logits: jax.Array | None, config: "ConfigDict"
) -> LossAndParts:
    """Returns ½·base + ½·cosub, the co-training of two submodels (arXiv 2212.04884).

    Rows 2i and 2i + 1 of the logits, here [2B,K] and of several heads the mean, are image i in one
    submodel and in the other. base is their mean sigmoid cross-entropy with the targets, cosub that
    of each with the other's probabilities, through which no gradient passes. As in the reference
    the loss is always class by class; for "bce" every target above 0 counts as 1.
    """
    if config.train.loss == "bce":
        targets = targets > 0
    pairs = (sum(heads) / len(heads)).reshape(len(targets), 2, -1)
    base = losses.sigmoid_cross_entropy(pairs, targets[:, None])
    others = jax.nn.sigmoid(jax.lax.stop_gradient(pairs[:, ::-1]).astype(jnp.float32))
    mutual = losses.sigmoid_cross_entropy(pairs, others)
    parts = {"base": base.mean(1), "cosub": mutual.mean(1)}
    return 0.5 * parts["base"] + 0.5 * parts["cosub"], parts
