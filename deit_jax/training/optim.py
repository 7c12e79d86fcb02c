"""Optimiser chain, learning-rate schedule, masks of decay and of training, and EMA.

The optimiser comes without a learning rate: the step computes `learning_rate(step)` and applies the
update with `apply_updates`, so the rate is a pure function of the step and never stored.
"""

import re
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from deit_jax import trees
from deit_jax.errors import InputError

if TYPE_CHECKING:  # the step runs without ml_collections, which GPU hosts may lack
    from ml_collections import ConfigDict

# Every parameter name ends in one of these or is an error: a new layer has to take a side.
_DECAYED = ("kernel",)
_NOT_DECAYED = ("scale", "bias", "gamma", "pos_embed", "cls_token", "reg_token", "freqs")

OPTIMIZERS = ("adamw", "lamb", "sgd")

Tree = Any


def learning_rate(
    step: jax.Array | int,
    schedule: "ConfigDict",
    *,
    peak_lr: float,
    warmup_epochs: int,
    steps_per_epoch: int,
) -> jax.Array:
    """Returns the float32 rate of update number `step` (from 0): linear warm-up, then cosine.

    value(t) rises linearly from `warmup_lr` to `peak_lr` over `warmup_epochs`, then follows the
    cosine over all `epochs`; the warm-up covers the first part of the cosine, it does not delay it.
    With `per_epoch`, as in the reference, the rate is constant within an epoch and lags by one:
    epoch e runs at value(max(e - 1, 0)), so epochs 0 and 1 both run at `warmup_lr`. Without it, the
    rate follows value(step / steps_per_epoch).

    Args:
      step: the number of an update, or an array of them.
      schedule: the config group of that name.
      peak_lr: the rate at which the warm-up ends.
      warmup_epochs: as the plan of the run has them.
      steps_per_epoch: updates in an epoch.
    """
    if schedule.per_epoch:
        t = jnp.maximum(jnp.asarray(step) // steps_per_epoch - 1, 0).astype(jnp.float32)
    else:
        t = jnp.asarray(step).astype(jnp.float32) / steps_per_epoch
    angle = jnp.pi * jnp.minimum(t / schedule.epochs, 1.0)
    low, start = schedule.min_lr, schedule.warmup_lr
    rate = low + 0.5 * (peak_lr - low) * (1.0 + jnp.cos(angle))
    if warmup_epochs > 0:
        rate = jnp.where(t < warmup_epochs, start + t * ((peak_lr - start) / warmup_epochs), rate)
    return rate


def decay_mask(params: Tree, *, decay_dist_token: bool = True) -> Tree:
    """Returns a tree like `params` with True where weight decay applies.

    Kernels decay (also convolutions); biases, norm scales, LayerScale gammas, the class token,
    registers, position embeddings and rotary frequencies do not. The reference decays the
    distillation token on purpose; recent timm does not: `decay_dist_token`.

    Raises:
      InputError: a parameter's name has no rule.
    """

    def decays(path: jax.tree_util.KeyPath, _: Any) -> bool:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if name == "dist_token":
            return decay_dist_token
        if name not in _DECAYED + _NOT_DECAYED:
            full = jax.tree_util.keystr(path, simple=True, separator="/")
            raise InputError(
                f"parameter {full!r}: no weight-decay rule for the name {name!r}; expected one of "
                f"{', '.join((*_DECAYED, *_NOT_DECAYED, 'dist_token'))}; add it to decay_mask"
            )
        return name in _DECAYED

    return jax.tree_util.tree_map_with_path(decays, params)


def trainable_mask(params: Tree, patterns: str) -> Tree:
    """Returns a tree like `params` with True where the optimiser may change something.

    Args:
      params: arrays or shapes.
      patterns: regular expressions with spaces between them, as in `optimizer.trainable`. A
        parameter trains where one of them matches its whole name (`blocks/0/attn/qkv/kernel`), or
        where there are none.

    Raises:
      InputError: a pattern matches no parameter.
    """
    names = trees.leaf_names(params)
    for pattern in patterns.split():
        if not any(re.fullmatch(pattern, name) for name in names):
            raise InputError(
                f"config.optimizer.trainable is {patterns!r}, but {pattern!r} matches no "
                f"parameter of the model; their names are like {names[0]} and {names[-1]}"
            )
    return trees.name_mask(params, patterns.split() or [".*"])


def freeze(params: Tree, patterns: str) -> Tree:
    """Returns `params` without a gradient where they do not train (`trainable_mask`)."""
    mask = trainable_mask(params, patterns)
    return jax.tree.map(lambda p, m: p if m else jax.lax.stop_gradient(p), params, mask)


def make_optimizer(params: Tree, config: "ConfigDict") -> optax.GradientTransformation:
    """Builds the transformation from gradients to updates, without the learning rate.

    "adamw" is decoupled as in torch: p ← p - lr·u with u = m̂ / (√v̂ + eps) + weight_decay·p.
    "lamb" is apex's FusedLAMB, with which DeiT III was trained (where `clip_norm` is 1): u as for
    AdamW, multiplied by ‖p‖ / ‖u‖ (1 if either is 0), tensor by tensor, where weight decay applies.
    "sgd" is torch's with Nesterov momentum: the decay is added to the gradient, and the momentum
    carries it on. `clip_norm` bounds the gradient's norm over all parameters; 0 means no clipping.

    Parameters that do not train (`trainable_mask`) have no moments and do not decay: their update
    is their gradient, which is 0 behind `freeze`.

    Args:
      params: arrays or shapes; they give the decay mask.
      config: the config group `optimizer`.

    Returns:
      A transformation whose output `apply_updates(params, updates, lr)` applies.

    Raises:
      InputError: an unknown optimiser, or a pattern that matches no parameter.
    """
    if config.name not in OPTIMIZERS:
        raise InputError(f"optimizer.name is {config.name!r}: expected {', '.join(OPTIMIZERS)}")
    chain = _chain(params, config)
    if config.trainable:
        chain = optax.masked(chain, trainable_mask(params, config.trainable))

    def update(*arguments: Tree) -> tuple[Tree, optax.OptState]:
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to an int32 power
            return chain.update(*arguments)

    return optax.GradientTransformation(chain.init, update)


def _chain(params: Tree, config: "ConfigDict") -> optax.GradientTransformation:
    mask = decay_mask(params, decay_dist_token=config.decay_dist_token)
    # A slot in either case: a run that resumes with clipping turned on finds its moments.
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    decay = optax.add_decayed_weights(config.weight_decay, mask)
    if config.name == "sgd":
        return optax.chain(clip, decay, optax.trace(config.momentum, nesterov=True))
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    if config.name == "adamw":
        return optax.chain(clip, adam, decay)
    # A ratio belongs to a tensor of the original, hence to one leaf here: qkv, too, is fused there.
    ratio = optax.masked(optax.scale_by_trust_ratio(), mask)
    return optax.chain(clip, adam, decay, ratio if config.weight_decay else optax.identity())


def apply_updates(params: Tree, updates: Tree, lr: jax.Array | float) -> Tree:
    """Returns `params - lr * updates`, leaf by leaf, in the dtype of the parameters."""
    return jax.tree.map(lambda p, u: (p - lr * u).astype(p.dtype), params, updates)


def ema_update(ema: Tree, new: Tree, decay: float) -> Tree:
    """Returns `decay * ema + (1 - decay) * new`, leaf by leaf.

    Written as a step towards `new`: .99996 and 4e-5 rounded to float32 sum to 1 + 5e-9, so that
    plain weights scale the EMA by 1 + 1.3e-4 in the long run (measured over 100 000 steps).
    """
    return jax.tree.map(lambda e, n: e + (1.0 - decay) * (n - e), ema, new)
