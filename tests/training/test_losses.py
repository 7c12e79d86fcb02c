"""Losses and task losses against torch, timm and numbers by hand."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deit_jax.errors import InputError
from deit_jax.training import losses, tasks
from tests.oracles import torch_training

INDEX = np.arange(20, dtype=np.float32).reshape(4, 5)
STUDENT, STUDENT_DIST = jnp.sin(1 + INDEX), jnp.cos(2 + INDEX)
TEACHER = jnp.sin(0.5 * INDEX)
TARGETS = np.random.default_rng(0).dirichlet(np.ones(5), 4).astype(np.float32)


def recipe(kind="none", *, loss="cross_entropy", cosub=False, **distill):
    distill = {"alpha": 0.5, "temperature": 1.0, "reduction": "numel"} | distill
    return SimpleNamespace(
        distill=SimpleNamespace(kind=kind, **distill),
        train=SimpleNamespace(loss=loss, cosub=cosub),
    )


def task_loss(config, heads=(STUDENT, STUDENT_DIST), targets=TARGETS, teacher=TEACHER):
    return tasks.choose_task(config)(heads, targets, teacher, config)


def submodels(first, second, heads=1):
    """Logits in the order in which the step has them, each image twice in a row.

    Of two heads that differ, but whose mean is given.
    """
    mean = jnp.stack([first, second], axis=1).reshape(-1, first.shape[-1])
    return (mean,) if heads == 1 else (mean - 1.5, mean + 1.5)


def random(*shape, scale=1.0, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * scale


def distributions(seed, *shape):
    return np.random.default_rng(seed).dirichlet(np.ones(shape[-1]), shape[0]).astype(np.float32)


def test_label_losses_equal_torch_per_example():
    logits, labels = random(6, 11, scale=4), np.array([0, 10, 3, 3, 7, 5])
    head = torch.tensor(logits)
    for smoothing in (0.0, 0.1):
        got = losses.cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing)
        options = {"label_smoothing": smoothing, "reduction": "none"}
        want = F.cross_entropy(head, torch.tensor(labels), **options)
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)
    targets = distributions(1, 6, 11)
    got = losses.soft_cross_entropy(jnp.asarray(logits), jnp.asarray(targets))
    want = F.cross_entropy(head, torch.tensor(targets), reduction="none")
    np.testing.assert_allclose(got, want.numpy(), rtol=2e-6)


def assert_equals_torch(loss, want_loss, heads, rtol):
    """The mean of `loss` and its gradient by every head, beside torch's."""
    value, grads = jax.value_and_grad(lambda heads: loss(heads).mean())(tuple(heads))
    tensors = [torch.tensor(x, requires_grad=True) for x in heads]
    want = want_loss(tensors)
    want.backward()
    assert value == pytest.approx(want.item(), rel=2e-6)
    for got, tensor in zip(grads, tensors, strict=True):
        np.testing.assert_allclose(got, tensor.grad.numpy(), rtol=rtol, atol=1e-8)


def test_binary_cross_entropy_equals_the_reference():
    """engine.py of the reference: 1[t > 0], then torch's mean over batch and classes."""
    targets = distributions(4, 6, 11) * (np.random.default_rng(4).random((6, 11)) < 0.3)
    targets[0] = 0  # no class, as no reference batch has
    hot = torch.tensor(targets).gt(0.0).float()
    assert_equals_torch(
        lambda heads: losses.binary_cross_entropy(heads[0], targets),
        lambda heads: torch.nn.BCEWithLogitsLoss()(heads[0], hot),
        [random(6, 11, scale=20)],
        rtol=2e-6,
    )


def torch_cosub(first, second, targets):
    """engine.py of the reference, where the two submodels are the halves of a doubled batch."""
    criterion = torch.nn.BCEWithLogitsLoss()
    loss = 0.25 * criterion(first, targets) + 0.25 * criterion(second, targets)
    loss = loss + 0.25 * criterion(first, second.detach().sigmoid())
    return loss + 0.25 * criterion(second, first.detach().sigmoid())


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("base_loss", losses.BASE_LOSSES)
def test_cosub_equals_the_reference(base_loss, count):
    config = recipe(loss=base_loss, cosub=True)
    targets = distributions(5, 6, 9) * (np.random.default_rng(5).random((6, 9)) < 0.5)
    wanted = torch.tensor(np.float32(targets > 0) if base_loss == "bce" else targets)
    heads = random(2, 6, 9, scale=5)
    loss, parts = task_loss(config, submodels(*heads, count), jnp.asarray(targets))
    np.testing.assert_allclose(loss, 0.5 * parts["base"] + 0.5 * parts["cosub"], rtol=1e-6)
    assert_equals_torch(
        lambda heads: task_loss(config, submodels(*heads, count), jnp.asarray(targets))[0],
        lambda heads: torch_cosub(*heads, wanted),
        heads,
        rtol=2e-6,
    )


@pytest.mark.parametrize(
    ("kind", "reduction"), [("hard", "numel"), ("soft", "numel"), ("soft", "batchmean")]
)
@pytest.mark.parametrize("count", [1, 2])
def test_distillation_and_its_gradients_equal_torch(kind, reduction, count):
    cls, dist, teacher = random(3, 6, 9, scale=3)
    targets = distributions(2, 6, 9)
    options = {"kind": kind, "alpha": 0.3, "temperature": 2.5, "reduction": reduction}
    assert_equals_torch(
        lambda heads: task_loss(recipe(**options), heads, targets, teacher)[0],
        lambda heads: torch_training.total_loss(
            heads, torch.tensor(targets), torch.tensor(teacher), **options
        ),
        [cls, dist][:count],
        rtol=2e-5,
    )
    to_teacher = jax.grad(lambda x: task_loss(recipe(**options), (cls, dist), targets, x)[0].sum())
    assert not np.any(to_teacher(teacher))


def test_parts_of_each_task():
    loss, parts = task_loss(recipe("hard", alpha=0.25, loss="bce"))
    assert set(parts) == {"base", "distill", "teacher_agreement"}
    np.testing.assert_allclose(loss, 0.75 * parts["base"] + 0.25 * parts["distill"], rtol=1e-6)
    base = losses.binary_cross_entropy(STUDENT, TARGETS)
    np.testing.assert_array_equal(parts["base"], base)
    agrees = STUDENT_DIST.argmax(1) == TEACHER.argmax(1)
    np.testing.assert_array_equal(parts["teacher_agreement"], agrees)
    loss, parts = task_loss(recipe(loss="bce"), heads=(STUDENT,))
    assert set(parts) == {"base"}
    np.testing.assert_array_equal(loss, base)


@pytest.mark.parametrize("base_loss", losses.BASE_LOSSES)
def test_without_a_teacher_the_mean_of_both_heads_learns_as_in_timm(base_loss):
    targets = distributions(2, 6, 9) * (np.random.default_rng(5).random((6, 9)) < 0.5)
    assert_equals_torch(
        lambda heads: task_loss(recipe(loss=base_loss), heads, targets, None)[0],
        lambda heads: torch_training.total_loss(
            [(heads[0] + heads[1]) / 2], torch.tensor(targets), None, "none", 0, 1, "", base_loss
        ),
        random(2, 6, 9, scale=3),
        rtol=2e-5,
    )


def soft(logits, teacher):
    return losses.soft_distillation(logits, teacher, temperature=3.0)


@pytest.mark.parametrize(
    "loss", [losses.soft_cross_entropy, losses.hard_distillation, soft, losses.binary_cross_entropy]
)
def test_bfloat16_logits_are_reduced_in_float32(loss):
    low = jnp.asarray(random(3, 1000, scale=5, seed=3), jnp.bfloat16)
    wide = low.astype(jnp.float32)
    got = loss(low, low[::-1])
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, loss(wide, wide[::-1]))


def test_large_logits_stay_finite():
    logits = jnp.array([[1e4, -1e4, 0.0]])
    assert losses.cross_entropy(logits, jnp.array([1]))[0] == pytest.approx(2e4)
    assert np.isfinite(soft(logits, logits[:, ::-1])[0])
    binary = losses.binary_cross_entropy(logits, jnp.float32(logits < 0))[0]
    assert binary == pytest.approx((2e4 + np.log(2)) / 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": recipe("sofd")}, "distill.kind is 'sofd'"),
        ({"config": recipe("soft", reduction="mean")}, "distill.reduction is 'mean'"),
        ({"config": recipe("hard"), "teacher": None}, "distill.teacher"),
    ],
)
def test_bad_input_is_one_line_that_names_the_field(arguments, message):
    with pytest.raises(InputError, match=message):
        task_loss(**arguments)
