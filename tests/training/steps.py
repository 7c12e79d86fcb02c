"""Train steps of small models, without a run around them."""

import numpy as np
from flax import nnx

from deit_jax.config.plan import plan_run
from deit_jax.models import registry
from deit_jax.models.network import split_model
from deit_jax.training import optim
from deit_jax.training.state import new_state
from deit_jax.training.step import make_train_step


def new_model(name, *, seed=0, **options):
    """The network of a model with ten classes, and its variables."""
    return split_model(registry.create_model(name, num_classes=10, **options, rngs=nnx.Rngs(seed)))


def new_batch(size, rng):
    images = rng.integers(0, 256, (size, 32, 32, 3), np.uint8)
    return {"image": images, "label": rng.integers(0, 10, size, np.int32)}


def build(config, network, variables, **options):
    """The step, not yet compiled, and the state that it begins with."""
    plan = plan_run(config, num_train=64, num_eval=8, num_classes=10, class_names=(), num_devices=1)
    optimizer = optim.make_optimizer(variables.params, config.optimizer)
    step = make_train_step(config, plan, network, optimizer, **options)
    return step, new_state(variables, optimizer, ema=True)
