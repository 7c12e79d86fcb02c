"""Gradient accumulation: the update of a whole batch from parts of it, on one device or several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import digits
from deit_jax import trees
from deit_jax.config.plan import plan_run
from deit_jax.models import registry
from deit_jax.models.network import Variables, split_model
from deit_jax.training import accumulate, optim
from deit_jax.training.state import new_state
from deit_jax.training.step import make_train_step

BATCH = 16


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return [
        {
            "image": rng.integers(0, 256, (BATCH, 32, 32, 3), np.uint8),
            "label": rng.integers(0, 10, BATCH).astype(np.int32),
        }
        for _ in range(5)
    ]


def train(model, micro_batches, data, **changes):
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
    plan = plan_run(config, num_train=64, num_eval=8, num_classes=10, class_names=(), num_devices=1)
    network, variables = split_model(
        registry.create_model(model, num_classes=10, **changes, rngs=nnx.Rngs(0))
    )
    optimizer = optim.make_optimizer(variables.params, config.optimizer)
    step = jax.jit(make_train_step(config, plan, network, optimizer))
    state = new_state(variables, optimizer, ema=False)
    for batch in data:
        state, metrics = step(state, None, batch)
    return trees.flat(variables.params), trees.flat(state.model.params), metrics


@pytest.mark.slow
def test_four_micro_batches_equal_the_batch(data):
    """Parameters after five steps, mixing and erasing on; each has moved a hundred times more."""
    options = {"patch_size": 8, "depth": 2}
    start, whole, metrics = train("deit_testing", 1, data, **options)
    _, parts, again = train("deit_testing", 4, data, **options)
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
    network, variables = split_model(
        registry.create_model("regnety_testing", num_classes=10, rngs=nnx.Rngs(0))
    )
    images = jnp.asarray(np.random.default_rng(0).normal(size=(8, 32, 32, 3)), jnp.float32)

    def loss(params, batch_stats, images, targets, key):
        heads, after = network(Variables(params, batch_stats), images, key)
        return heads[0].sum(), (after, {})

    def run(model, images, steps=1):
        key = jax.random.key(0)
        return accumulate.gradient(loss, model, images, images[:, 0, 0], key, steps=steps)[1]

    found = jax.jit(run, static_argnames="steps")(variables, images, steps=2)
    first = run(variables, images[:4])
    second = run(variables.replace(batch_stats=first), images[4:])
    for name, want in trees.flat(second).items():
        np.testing.assert_allclose(trees.flat(found)[name], want, rtol=1e-4, atol=1e-6)


def test_micro_batches_of_one_device_are_consecutive_rows():
    want = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    np.testing.assert_array_equal(accumulate.micro_batches(jnp.arange(12), 3, None), want)


ON_EIGHT_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from deit_jax.models.network import Variables
from deit_jax.parallel import mesh as parallel
from deit_jax.training.accumulate import gradient, micro_batches

mesh = parallel.make_mesh(fsdp=2)
rows, replicated = parallel.batch_sharding(mesh), parallel.replicated(mesh)
x = jax.device_put(np.arange(32.0), rows)
cut = jax.jit(lambda x: micro_batches(x, 2, replicated)).lower(x).compile()
assert not any(word in cut.as_text() for word in ("all-", "collective", "permute")), cut.as_text()
want = np.arange(32.0).reshape(8, 2, 2).swapaxes(0, 1).reshape(2, 16)
np.testing.assert_array_equal(cut(x), want)

images = np.random.default_rng(0).normal(size=(32, 4, 4, 3)).astype(np.float32)
def loss(weights, stats, images, targets, key):
    value = jnp.square(images.mean((1, 2)) @ weights - targets).mean()
    return value, (stats, {"loss": value})
def run(images, steps, sharding):
    model, targets = Variables(jnp.eye(3), {}), images[:, 0, 0]
    key = jax.random.key(0)
    return gradient(loss, model, images, targets, key, steps=steps, replicated=sharding)
run = jax.jit(run, static_argnums=(1, 2))
grads, _, metrics = run(images, 1, None)
again, _, metrics_again = run(jax.device_put(images, rows), 4, replicated)
np.testing.assert_allclose(again, grads, rtol=1e-5, atol=1e-7)
np.testing.assert_allclose(metrics_again["loss"], metrics["loss"], rtol=1e-6)
"""


@pytest.mark.slow
def test_micro_batches_take_a_share_of_every_devices_rows(check_on_devices):
    """On a 4 × 2 mesh: no row leaves its device, and the gradient is that of the batch."""
    check_on_devices(ON_EIGHT_DEVICES)
