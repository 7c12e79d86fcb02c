"""The training state: what a run carries from step to step, and all that a checkpoint holds."""

import jax
import jax.numpy as jnp
import optax
from flax import struct

from deit_jax.models.network import Variables


@struct.dataclass
class TrainState:
    """Everything that a run carries from one step to the next, and all that a checkpoint holds.

    Attributes:
      step: int32 scalar, batches consumed so far; data position and randomness follow from it.
      model: parameters and BatchNorm statistics in training, float32.
      opt_state: the optimiser's moments.
      ema: the EMA of `model`, or None where it is off.
      nonfinite_steps: int32 scalar, steps skipped in a row for a non-finite loss or gradient.
      nonfinite_total: int32 scalar, steps skipped in the whole run.
    """

    step: jax.Array
    model: Variables
    opt_state: optax.OptState
    ema: Variables | None
    nonfinite_steps: jax.Array
    nonfinite_total: jax.Array


def new_state(
    model: Variables, optimizer: optax.GradientTransformation, *, ema: bool
) -> TrainState:
    """Returns a state at step 0. The EMA starts as a copy of the weights (reference)."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        model=model,
        opt_state=optimizer.init(model.params),
        ema=jax.tree.map(jnp.copy, model) if ema else None,
        nonfinite_steps=jnp.zeros((), jnp.int32),
        nonfinite_total=jnp.zeros((), jnp.int32),
    )


def init_key(seed: int) -> jax.Array:
    """Returns the key that a run's parameters are drawn from.

    It has the number of a step that no run reaches. From the run's own key, parameter k would be
    drawn with the very key that step k splits (`nnx.Rngs` numbers its draws, as we our steps).
    """
    return jax.random.fold_in(jax.random.key(seed), 2**32 - 1)


def step_keys(seed: int, step: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the keys of a training step: of its augmentation, and of the network's own noise."""
    augment_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
    return augment_key, noise_key
