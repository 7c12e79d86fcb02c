"""Schedule, decay groups, AdamW, LAMB, SGD and EMA against timm and torch."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from deit_jax import trees
from deit_jax.config.fields import default_config
from deit_jax.errors import InputError
from deit_jax.models.network import split_model
from deit_jax.models.registry import abstract_model
from deit_jax.training import optim
from tests.oracles.torchvision_ops import import_torchvision


def config(**changes):
    optimizer = default_config().optimizer
    optimizer.update(changes)
    return optimizer


def test_learning_rate_per_step_has_no_lag():
    """The rates of every epoch stand beside the reference's in tests/config/test_recipes.py."""
    schedule = SimpleNamespace(epochs=10, min_lr=0.1, per_epoch=False, warmup_lr=1e-6)

    def rate(step, warmup=5):
        options = {"peak_lr": 1.0, "warmup_epochs": warmup, "steps_per_epoch": 4}
        return optim.learning_rate(step, schedule, **options)

    np.testing.assert_allclose(rate(2), 1e-6 + 0.5 * (1 - 1e-6) / 5, rtol=1e-6)
    np.testing.assert_allclose(rate(0), 1e-6, rtol=1e-6)
    # The cosine has been running since step 0; at epoch 7.5 of 10 it stands at cos(0.75 π).
    np.testing.assert_allclose(rate(30), 0.1 + 0.45 * (1 + math.cos(0.75 * math.pi)), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(rate)(40), 0.1, rtol=1e-6)
    assert rate(0, warmup=0) == pytest.approx(1.0)


def abstract_params(name: str, **options) -> dict:
    return split_model(abstract_model(name, **options))[1].params


def small_params() -> dict:
    """Random numbers in parameters of every kind."""
    options = {"depth": 1, "embed_dim": 8, "num_heads": 2, "patch_size": 16, "num_classes": 4}
    shapes = abstract_params("deit_testing_distilled", layer_scale_init=1.0, **options)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)


ATTENTION_ONLY = ".*/attn/.* head/.* pos_embed"


def test_attention_alone_trains_as_many_parameters_as_in_the_reference():
    """--attn-only of the reference, counted there for DeiT III-B."""
    params = abstract_params("deit3_base_patch16_224")
    mask = optim.trainable_mask(params, ATTENTION_ONLY)
    assert trees.param_count(params) == 86_585_320
    assert trees.param_count(trees.select(params, mask)) == 29_267_944
    assert all(jax.tree.leaves(optim.trainable_mask(params, "")))


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_frozen_parameters_keep_every_bit_and_the_others_do_not_notice(name):
    """The rest trains as it would alone: no norm, no moment and no decay counts what is frozen."""
    params = small_params()

    def part(tree):
        blocks = {0: {"attn": tree["blocks"][0]["attn"]}}
        return {"pos_embed": tree["pos_embed"], "blocks": blocks, "head": tree["head"]}

    settings = {"name": name, "clip_norm": 1.0, "weight_decay": 0.5}
    rng = np.random.default_rng(1)
    grads = [
        jax.tree.map(lambda p: np.float32(rng.normal(size=p.shape)), part(params)) for _ in range(3)
    ]
    zeros = jax.tree.map(np.zeros_like, params)
    block = zeros["blocks"][0]
    full = [zeros | g | {"blocks": {0: block | g["blocks"][0]}} for g in grads]
    got = trees.flat(run(config(**settings, trainable=ATTENTION_ONLY), params, full, [0.1] * 3))
    want = trees.flat(run(config(**settings), part(params), grads, [0.1] * 3))
    for leaf, before in trees.flat(params).items():
        np.testing.assert_array_equal(got[leaf], want.get(leaf, before), err_msg=leaf)
    state = optim.make_optimizer(params, config(**settings, trainable=ATTENTION_ONLY)).init(params)
    moments = 1 if name == "sgd" else 2
    stored = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert stored == moments * trees.param_count(part(params))


def test_regnet_decays_exactly_its_matrices_and_convolutions():
    params = abstract_params("regnety_testing")
    mask = optim.decay_mask(params)
    by_rank = jax.tree.map(lambda leaf: leaf.ndim > 1, params)  # the rule for torch's tensors
    assert mask == by_rank
    with pytest.raises(InputError, match="'blocks/0/rel_bias'"):
        optim.decay_mask({"blocks": {0: {"rel_bias": jnp.zeros(3)}}})


def run(settings, params, grads, rates):
    """Train with one gradient and one rate a step; shapes are enough to build the optimiser."""
    optimizer = optim.make_optimizer(jax.eval_shape(lambda: params), settings)

    @jax.jit
    def step(params, state, grad, rate):
        updates, state = optimizer.update(grad, state, params)
        return optim.apply_updates(params, updates, rate), state

    state = optimizer.init(params)
    for grad, rate in zip(grads, rates, strict=True):
        params, state = step(params, state, grad, rate)
    return params


def torch_optimizer(name: str, groups: list[dict]) -> torch.optim.Optimizer:
    """What the reference trained with; timm's LAMB stands in for apex's, which needs CUDA."""
    if name == "adamw":
        return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)
    import_torchvision()
    from timm.optim import Lamb

    return Lamb(groups, betas=(0.9, 0.999), eps=1e-8, max_grad_norm=1.0)


def run_torch(settings, params, grads, rates):
    """As `run`, in torch; the decay mask gives the groups of parameters."""
    leaves = [torch.tensor(np.asarray(x), requires_grad=True) for x in jax.tree.leaves(params)]
    groups = [{"params": [], "weight_decay": decay} for decay in (0.0, settings.weight_decay)]
    for leaf, decays in zip(leaves, jax.tree.leaves(optim.decay_mask(params)), strict=True):
        groups[decays]["params"].append(leaf)
    optimizer = torch_optimizer(settings.name, groups)
    for rate, grad in zip(rates, grads, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for leaf, g in zip(leaves, jax.tree.leaves(grad), strict=True):
            leaf.grad = torch.tensor(np.asarray(g))
        if settings.clip_norm and settings.name != "lamb":  # LAMB clips on its own
            torch.nn.utils.clip_grad_norm_(leaves, settings.clip_norm)
        optimizer.step()
    return [x.detach().numpy() for x in leaves]


@pytest.mark.parametrize(
    ("name", "weight_decay", "clip_norm"),
    [
        ("adamw", 0.05, 0.0),
        ("adamw", 0.05, 1.5),
        ("lamb", 0.05, 1.0),
        ("lamb", 0.0, 1.0),  # apex: no decay, no ratio
        ("sgd", 0.05, 0.0),
        ("sgd", 0.05, 1.5),
    ],
)
def test_optimizers_equal_torch_for_ten_steps(name, weight_decay, clip_norm):
    start = small_params()
    start["head"]["kernel"] *= 0  # its first ratio of norms would be 0 / ‖u‖
    rng = np.random.default_rng(1)
    sizes = [1.0] * 9 + [1e-3]  # the last gradient is too small to be clipped
    grads = [
        jax.tree.map(lambda p, s=size: np.float32(s * rng.normal(size=p.shape)), start)
        for size in sizes
    ]
    rates = [1e-3 * (1 + i % 3) for i in range(10)]
    settings = config(name=name, weight_decay=weight_decay, clip_norm=clip_norm)
    params = run(settings, start, grads, rates)
    want = run_torch(settings, start, grads, rates)
    for got, expected in zip(jax.tree.leaves(params), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=3e-7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adam"}, r"optimizer\.name is 'adam'"),
        ({"trainable": "head/.* kernel"}, r"optimizer\.trainable is .* 'kernel' matches"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        optim.make_optimizer(small_params(), config(**settings))


def test_lamb_recipe_vector():
    """Two steps of apex's kernel, restated in float64; the gradients' norm of 1.747 is clipped."""
    index = np.arange(6, dtype=np.float32).reshape(2, 3)
    params = {"kernel": jnp.sin(index), "bias": jnp.array([0.5, -0.5])}
    grads = {"kernel": jnp.cos(index), "bias": jnp.array([0.3, -0.1])}
    params = run(config(name="lamb", clip_norm=1.0), params, [grads] * 2, [0.01] * 2)
    want = [-0.0142973, 0.8265721, 0.9229447, 0.1553165, -0.7419641, -0.9725361]
    np.testing.assert_allclose(params["kernel"].ravel(), want, atol=2e-7)
    np.testing.assert_allclose(params["bias"], [0.48, -0.48], atol=2e-7)


def test_ema_does_not_drift_over_a_long_run():
    # decay and 1 - decay rounded to float32 sum to 1 + 5e-9: as plain weights they bias every
    # average by 1e-4. Single values carry rounding noise of that size, so compare the mean.
    steps, decay = 60_000, 0.99996
    rng = np.random.default_rng(0)
    size, speed = rng.normal(size=2000).astype(np.float32), np.linspace(1e-5, 1e-4, 2000)
    exact = size.astype(np.float64)
    for i in range(steps):
        exact = decay * exact + (1 - decay) * size * (1 + 0.5 * np.sin(i * speed))

    def step(i, ema):
        target = size * (1 + 0.5 * jnp.sin(i * jnp.float32(speed)))
        return optim.ema_update(ema, target, decay)

    got = np.asarray(jax.lax.fori_loop(0, steps, step, jnp.asarray(size)), np.float64)
    assert abs(np.mean(got / exact - 1)) < 2e-5
