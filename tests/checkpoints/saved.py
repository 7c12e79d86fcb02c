"""Small models and states full of random numbers, saved and compared."""

import contextlib

import jax
import numpy as np
import optax

from deit_jax import trees
from deit_jax.checkpoints.training import TrainCheckpoints
from deit_jax.models import registry
from deit_jax.models.network import join_model, split_model
from deit_jax.training.state import new_state

TINY = {"num_classes": 3, "embed_dim": 8, "num_heads": 2, "patch_size": 16}


def random_model(name="deit_testing", *, seed=0, **options):
    """A model full of random numbers, none of them compiled."""
    network, like = split_model(registry.abstract_model(name, **options))
    rng = np.random.default_rng(seed)
    weights = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), like)
    return join_model(network, weights)


def tiny(*, seed=0, depth=1, **options):
    return random_model(seed=seed, depth=depth, **(TINY | options))


def arrays(model_or_tree):
    tree = split_model(model_or_tree)[1] if hasattr(model_or_tree, "info") else model_or_tree
    return {name: np.asarray(leaf) for name, leaf in trees.flat(tree).items()}


def assert_equal(found, expected):
    found, expected = arrays(found), arrays(expected)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def random_state(*, seed=0, ema=True, optimizer=None, **options):
    network, variables = split_model(tiny(seed=seed, **options))
    state = new_state(variables, optimizer or optax.adamw(1e-3), ema=ema)
    # Moments and average away from their initial values, or a restore that skips them would pass.
    rng = np.random.default_rng(seed + 100)

    def noisy(x):
        return x + (rng.standard_normal(x.shape).astype(x.dtype) if x.ndim else seed)

    state = state.replace(
        opt_state=jax.tree.map(noisy, state.opt_state), ema=jax.tree.map(noisy, state.ema)
    )
    return network.info, jax.tree.map(jax.numpy.asarray, state)


def opened(workdir, *, keep=2, **options):
    return contextlib.closing(TrainCheckpoints(workdir, keep=keep, **options))


def save(checkpoints, info, state, step, best=None):
    best = {"top1": 61.5, "step": step if best is None else best}
    checkpoints.save(state, info, step=step, best=best)


def abstract(state):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)
