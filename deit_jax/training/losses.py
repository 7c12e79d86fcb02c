"""Losses per image, [B] float32: their mean over the batch is the reference's value.

All arithmetic is in float32, whatever the dtype of the logits. A value per image keeps a masked or
sharded mean exact.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from deit_jax.errors import InputError


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the cross-entropy [B] of logits [B,K] with target distributions [B,K]."""
    return -jnp.sum(targets.astype(jnp.float32) * _log_softmax(logits), axis=-1)


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the sigmoid cross-entropy of logits [B,K] with targets [B,K], averaged over K: [B].

    Every target above 0 counts as 1, so that both classes of a mixed image are true whatever λ is
    (DeiT III, after "ResNet strikes back"). Smoothed targets, all above 0, would teach nothing.
    """
    return sigmoid_cross_entropy(logits, targets > 0)


BASE_LOSSES = {"cross_entropy": soft_cross_entropy, "bce": binary_cross_entropy}


def sigmoid_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the mean [...] over the last axis of -t·log σ(x) - (1 - t)·log σ(-x)."""
    logits, targets = logits.astype(jnp.float32), targets.astype(jnp.float32)
    terms = targets * jax.nn.log_sigmoid(logits) + (1.0 - targets) * jax.nn.log_sigmoid(-logits)
    return -jnp.mean(terms, axis=-1)


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Returns the cross-entropy [B] of logits [B,K] with class indices [B], with smoothing ε.

    (1 - ε) times the negative log-likelihood plus ε times the mean of -log p over the classes.
    """
    log_probs = _log_softmax(logits)
    # A comparison instead of a gather: it shards over the batch and over the classes alike.
    hit = labels[:, None] == jnp.arange(logits.shape[-1])[None]
    nll = -jnp.sum(jnp.where(hit, log_probs, 0.0), axis=-1)
    if smoothing == 0:
        return nll
    return (1.0 - smoothing) * nll - smoothing * jnp.mean(log_probs, axis=-1)


def hard_distillation(logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """Returns the cross-entropy [B] of logits [B,K] with the teacher's decision, not smoothed."""
    return cross_entropy(logits, jnp.argmax(teacher_logits, axis=-1))


def soft_distillation(
    logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    temperature: float,
    reduction: Literal["numel", "batchmean"] = "numel",
) -> jax.Array:
    """Returns T² KL(teacher ‖ student) [B] between the softened distributions of logits [B,K].

    "numel" also divides by K, as the reference does on purpose (its mean is over B·K); "batchmean"
    is the textbook loss. No gradient reaches the teacher.
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


def _log_softmax(logits: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
