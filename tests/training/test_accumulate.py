"""Gradient accumulation: the update of a whole batch from parts of it, on one device or several."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from deit_jax import trees
from deit_jax.models.network import Variables
from deit_jax.training import accumulate
from tests.training import steps

BATCH = 16


def train(micro_batches):
    """Five steps of SGD, whose update is linear in the gradient and hides none of its errors."""
    config = digits.get_config()
    config.model.drop_path_rate = 0.0
    config.mixing.random_erasing = 0.5
    config.mixing.cutmix_alpha = 1.0
    config.mixing.group_size = 8  # a micro-batch is smaller
    config.optimizer.name = "sgd"
    config.optimizer.lr = config.schedule.warmup_lr = 0.05
    config.train.batch_size = BATCH
    config.train.accumulate_steps = micro_batches
    network, variables = steps.new_model("deit_testing", patch_size=8, depth=2)
    step, state = steps.build(config, network, variables)
    step, rng = jax.jit(step), np.random.default_rng(0)
    for _ in range(5):
        state, metrics = step(state, None, steps.new_batch(BATCH, rng))
    return trees.flat(variables.params), trees.flat(state.model.params), metrics


@pytest.mark.slow
def test_four_micro_batches_equal_the_batch():
    """Parameters after five steps, mixing and erasing on; each has moved a hundred times more."""
    start, whole, metrics = train(1)
    _, parts, again = train(4)
    for name, want in whole.items():
        scale = np.abs(want).max()
        np.testing.assert_allclose(parts[name], want, rtol=0, atol=1e-6 * scale, err_msg=name)
        if "bias" not in name:
            assert np.abs(want - start[name]).max() > 1e-4 * scale, name
    for name in ("loss", "base", "grad_norm"):
        assert float(again[name]) == pytest.approx(float(metrics[name]), rel=1e-5)


@pytest.mark.slow
def test_batch_norm_records_every_micro_batch():
    """As PyTorch: the second micro-batch's record lies on top of the first one's."""
    network, variables = steps.new_model("regnety_testing", depth=4)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(8, 32, 32, 3)), jnp.float32)

    def loss(params, batch_stats, images, targets, key):
        heads, after = network(Variables(params, batch_stats), images, key)
        return heads[0].sum(), (after, {})

    @functools.partial(jax.jit, static_argnames="steps")
    def run(model, images, steps=1):
        key = jax.random.key(0)
        return accumulate.gradient(loss, model, images, images[:, 0, 0], key, steps=steps)[1]

    found = run(variables, images, steps=2)
    first = run(variables, images[:4])
    second = run(variables.replace(batch_stats=first), images[4:])
    for name, want in trees.flat(second).items():
        np.testing.assert_allclose(trees.flat(found)[name], want, rtol=1e-4, atol=1e-6)


ON_EIGHT_DEVICES = """
import jax, numpy as np
from deit_jax.parallel import mesh as parallel
from deit_jax.training.accumulate import micro_batches

mesh = parallel.make_mesh(fsdp=2)
rows, replicated = parallel.batch_sharding(mesh), parallel.replicated(mesh)
x = jax.device_put(np.arange(32.0), rows)
cut = jax.jit(lambda x: micro_batches(x, 2, replicated)).lower(x).compile()
assert not any(word in cut.as_text() for word in ("all-", "collective", "permute")), cut.as_text()
want = np.arange(32.0).reshape(8, 2, 2).swapaxes(0, 1).reshape(2, 16)
np.testing.assert_array_equal(cut(x), want)
"""


@pytest.mark.slow
def test_micro_batches_take_a_share_of_every_devices_rows(run_on_devices):
    """On a 4 × 2 mesh: no row leaves its device. Whole steps are in test_pmap.py."""
    run_on_devices("-c", ON_EIGHT_DEVICES)
