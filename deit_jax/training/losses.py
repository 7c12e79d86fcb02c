"""Losses per example, [B] float32, so that any masked or sharded mean over them is exact.

All arithmetic is float32 whatever comes in. A mean over the batch gives the reference's value.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from deit_jax.errors import InputError

Base = Literal["cross_entropy", "bce"]
Reduction = Literal["numel", "batchmean"]


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy [B] of logits [B,K] against target distributions [B,K]."""
    return -jnp.sum(targets.astype(jnp.float32) * _log_softmax(logits), axis=-1)


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean [B] over the classes of the sigmoid cross-entropy of logits [B,K] with targets [B,K].

    Every target above 0 counts as 1, so that both classes of a mixed image are true and λ has no
    say (DeiT III, after ResNet strikes back). Smoothed targets, all above 0, would teach nothing.
    """
    return _sigmoid_cross_entropy(logits, targets > 0)


def cosub(
    first: jax.Array, second: jax.Array, targets: jax.Array, *, base_loss: Base
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the co-training loss [B] of two submodels and its unweighted parts (arXiv 2212.04884).

    ½·base + ½·cosub over logits [B,K] of the same images: base is the submodels' mean sigmoid
    cross-entropy with `targets` [B,K], cosub that of each with the other's probabilities, through
    which no gradient passes. As in the reference it is always class by class; for "bce" every
    target above 0 counts as 1.
    """
    if base_loss == "bce":
        targets = targets > 0
    both = jnp.stack([first, second])
    base = _sigmoid_cross_entropy(both, targets)
    others = jax.nn.sigmoid(jax.lax.stop_gradient(both[::-1]).astype(jnp.float32))
    mutual = _sigmoid_cross_entropy(both, others)
    parts = {"base": base.mean(0), "cosub": mutual.mean(0)}
    return 0.5 * parts["base"] + 0.5 * parts["cosub"], parts


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy [B] of logits [B,K] against class indices [B], with label smoothing ε.

    (1 - ε) times the negative log-likelihood plus ε times the mean of -log p over the classes.
    """
    log_probs = _log_softmax(logits)
    # A comparison instead of a gather: it shards over the batch and over the classes alike.
    hit = labels[:, None] == jnp.arange(logits.shape[-1])
    nll = -jnp.sum(jnp.where(hit, log_probs, 0.0), axis=-1)
    if smoothing == 0:
        return nll
    return (1.0 - smoothing) * nll - smoothing * jnp.mean(log_probs, axis=-1)


def hard_distillation(logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """Cross-entropy [B] of logits [B,K] against the teacher's decision, not smoothed."""
    return cross_entropy(logits, jnp.argmax(teacher_logits, axis=-1))


def soft_distillation(
    logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    temperature: float,
    reduction: Reduction = "numel",
) -> jax.Array:
    """T² KL(teacher ‖ student) [B] between the softened distributions of logits [B,K].

    `"numel"` divides by K as well, as the reference does on purpose (its mean is over B·K);
    `"batchmean"` is the textbook loss. No gradient reaches the teacher.
    """
    student = _log_softmax(logits.astype(jnp.float32) / temperature)
    teacher = _log_softmax(jax.lax.stop_gradient(teacher_logits).astype(jnp.float32) / temperature)
    divergence = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1) * temperature**2
    if reduction == "numel":
        return divergence / logits.shape[-1]
    if reduction == "batchmean":
        return divergence
    raise InputError(
        f"distill.reduction is {reduction!r}: expected 'numel' (the reference) or 'batchmean'"
    )


BASE_LOSSES = {"cross_entropy": soft_cross_entropy, "bce": binary_cross_entropy}


def total_loss(
    head_logits: tuple[jax.Array, ...],
    targets: jax.Array,
    teacher_logits: jax.Array | None,
    *,
    kind: Literal["none", "hard", "soft"],
    alpha: float,
    temperature: float,
    reduction: Reduction = "numel",
    base_loss: Base = "cross_entropy",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the training loss [B] and its unweighted parts: "base" and, distilling, "distill".

    (1 - α)·base + α·distill, where base compares head 0 (class token) with `targets` [B,K], by soft
    cross-entropy or, for "bce", class by class, and distill compares head 1 (distillation token)
    with the teacher. With kind "none" the loss is base alone, and a second head gets no gradient,
    as in the reference.

    Raises InputError for an unknown kind, and for distillation without a teacher or second head.
    """
    if base_loss not in BASE_LOSSES:
        raise InputError(f"train.loss is {base_loss!r}: expected {' or '.join(BASE_LOSSES)}")
    base = BASE_LOSSES[base_loss](head_logits[0], targets)
    if kind == "none":
        return base, {"base": base}
    if kind not in ("hard", "soft"):
        raise InputError(f"distill.kind is {kind!r}: expected 'none', 'hard' or 'soft'")
    if teacher_logits is None:
        raise InputError(f"distill.kind is {kind!r} but there is no teacher: set distill.teacher")
    if len(head_logits) != 2:
        raise InputError(
            f"distill.kind is {kind!r} but the model has {len(head_logits)} head: expected a "
            "distilled model with two, e.g. deit_base_distilled_patch16_224"
        )
    if kind == "hard":
        distill = hard_distillation(head_logits[1], teacher_logits)
    else:
        distill = soft_distillation(
            head_logits[1], teacher_logits, temperature=temperature, reduction=reduction
        )
    return (1.0 - alpha) * base + alpha * distill, {"base": base, "distill": distill}


def _log_softmax(logits: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)


def _sigmoid_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    logits, targets = logits.astype(jnp.float32), targets.astype(jnp.float32)
    terms = targets * jax.nn.log_sigmoid(logits) + (1.0 - targets) * jax.nn.log_sigmoid(-logits)
    return -jnp.mean(terms, axis=-1)
