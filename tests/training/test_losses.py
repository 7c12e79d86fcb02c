"""Losses against torch, timm and hand-checked numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deit_jax.errors import InputError
from deit_jax.training import losses, mixing
from tests.oracles import torch_training

INDEX = np.arange(20, dtype=np.float64).reshape(4, 5)
STUDENT, STUDENT_DIST, TEACHER = np.sin(1 + INDEX), np.cos(2 + INDEX), np.sin(0.5 * INDEX)
LABELS = np.array([0, 2, 4, 1])


def mixed_targets(smoothing: float = 0.1) -> jax.Array:
    draw = mixing.MixDraw(jnp.array([0.7]), jnp.array([False]), jnp.zeros((1, 4), jnp.int32))
    hot = mixing.one_hot_smooth(jnp.asarray(LABELS), 5, smoothing)
    return mixing.apply_mix(jnp.zeros((4, 1, 1, 3)), hot, draw)[1]


def total(kind: str, **options):
    heads = (jnp.asarray(STUDENT), jnp.asarray(STUDENT_DIST))
    options = {"alpha": 0.5, "temperature": 1.0, "reduction": "numel"} | options
    return losses.total_loss(heads, mixed_targets(), jnp.asarray(TEACHER), kind=kind, **options)


def test_recipe_vectors():
    np.testing.assert_allclose(mixed_targets()[0], [0.65, 0.29, 0.02, 0.02, 0.02], atol=1e-7)
    base = losses.soft_cross_entropy(jnp.asarray(STUDENT), mixed_targets())
    assert base.shape == (4,)
    assert base.mean() == pytest.approx(1.6084588, abs=2e-7)
    binary = losses.binary_cross_entropy(jnp.asarray(STUDENT), mixed_targets(smoothing=0.0))
    assert binary.shape == (4,)
    assert binary.mean() == pytest.approx(0.6796833, abs=2e-7)
    smooth = losses.cross_entropy(jnp.asarray(STUDENT), jnp.asarray(LABELS), 0.1)
    assert smooth.mean() == pytest.approx(1.5394616, abs=2e-7)
    hard = losses.hard_distillation(jnp.asarray(STUDENT_DIST), jnp.asarray(TEACHER))
    assert hard.mean() == pytest.approx(1.6162078, abs=2e-7)
    assert total("hard")[0].mean() == pytest.approx(1.6123333, abs=2e-7)
    assert total("soft")[0].mean() == pytest.approx(0.8359652, abs=2e-7)
    cool = {"alpha": 0.1, "temperature": 3.0}
    assert total("soft", **cool)[0].mean() == pytest.approx(1.4543908, abs=2e-7)
    per_batch = total("soft", **cool, reduction="batchmean")[0].mean()
    assert per_batch == pytest.approx(1.4815023, abs=2e-7)


def test_label_losses_equal_torch_per_example():
    logits = np.random.default_rng(0).normal(size=(6, 11)).astype(np.float32) * 4
    labels = np.array([0, 10, 3, 3, 7, 5])
    targets = np.random.default_rng(1).dirichlet(np.ones(11), 6).astype(np.float32)
    for smoothing in (0.0, 0.1):
        got = losses.cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing)
        want = F.cross_entropy(
            torch.tensor(logits),
            torch.tensor(labels),
            label_smoothing=smoothing,
            reduction="none",
        )
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)
    got = losses.soft_cross_entropy(jnp.asarray(logits), jnp.asarray(targets))
    want = F.cross_entropy(torch.tensor(logits), torch.tensor(targets), reduction="none")
    np.testing.assert_allclose(got, want.numpy(), rtol=2e-6)


def test_binary_cross_entropy_equals_the_reference():
    """engine.py of the reference: 1[t > 0], then torch's mean over batch and classes."""
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(6, 11)).astype(np.float32) * 20
    targets = rng.dirichlet(np.ones(11), 6).astype(np.float32) * (rng.random((6, 11)) < 0.3)
    targets[0] = 0  # no class, as no reference batch has

    def mean_loss(logits):
        return losses.binary_cross_entropy(logits, targets).mean()

    value, grad = jax.value_and_grad(mean_loss)(jnp.asarray(logits))
    head = torch.tensor(logits, requires_grad=True)
    want = torch.nn.BCEWithLogitsLoss()(head, torch.tensor(targets).gt(0.0).float())
    want.backward()
    assert value == pytest.approx(want.item(), rel=1e-6)
    np.testing.assert_allclose(grad, head.grad.numpy(), rtol=2e-6, atol=1e-9)


def torch_cosub(first, second, targets):
    """engine.py of the reference, where the two submodels are the halves of a doubled batch."""
    criterion = torch.nn.BCEWithLogitsLoss()
    loss = 0.25 * criterion(first, targets) + 0.25 * criterion(second, targets)
    loss = loss + 0.25 * criterion(first, second.detach().sigmoid())
    return loss + 0.25 * criterion(second, first.detach().sigmoid())


def test_cosub_equals_the_reference():
    hot = mixed_targets(smoothing=0.0)
    loss, parts = losses.cosub(
        jnp.asarray(STUDENT), jnp.asarray(STUDENT_DIST), hot, base_loss="bce"
    )
    assert loss.shape == (4,)
    assert loss.mean() == pytest.approx(0.8154081, abs=2e-7)
    np.testing.assert_allclose(loss, 0.5 * parts["base"] + 0.5 * parts["cosub"], rtol=1e-6)
    rng = np.random.default_rng(5)
    first, second = rng.normal(size=(2, 6, 9)).astype(np.float32) * 5
    targets = rng.dirichlet(np.ones(9), 6).astype(np.float32) * (rng.random((6, 9)) < 0.5)
    for base_loss, wanted in (("bce", targets > 0), ("cross_entropy", targets)):

        def mean_loss(first, second, base_loss=base_loss):
            return losses.cosub(first, second, targets, base_loss=base_loss)[0].mean()

        value, grads = jax.value_and_grad(mean_loss, argnums=(0, 1))(
            jnp.asarray(first), jnp.asarray(second)
        )
        heads = [torch.tensor(x, requires_grad=True) for x in (first, second)]
        want = torch_cosub(*heads, torch.tensor(wanted.astype(np.float32)))
        want.backward()
        assert value == pytest.approx(want.item(), rel=1e-6)
        for got, head in zip(grads, heads, strict=True):
            np.testing.assert_allclose(got, head.grad.numpy(), rtol=2e-6, atol=1e-8)


def test_bce_as_base_of_the_total_loss():
    loss, parts = total("hard", base_loss="bce", alpha=0.25)
    base = losses.binary_cross_entropy(jnp.asarray(STUDENT), mixed_targets())
    np.testing.assert_array_equal(parts["base"], base)
    np.testing.assert_allclose(loss, 0.75 * base + 0.25 * parts["distill"], rtol=1e-6)
    np.testing.assert_array_equal(total("none", base_loss="bce")[0], base)


@pytest.mark.parametrize(
    ("kind", "reduction"), [("hard", "numel"), ("soft", "numel"), ("soft", "batchmean")]
)
def test_total_loss_and_gradients_equal_torch(kind, reduction):
    rng = np.random.default_rng(2)
    cls, dist, teacher = rng.normal(size=(3, 6, 9)).astype(np.float32) * 3
    targets = rng.dirichlet(np.ones(9), 6).astype(np.float32)
    options = {"kind": kind, "alpha": 0.3, "temperature": 2.5, "reduction": reduction}

    def mean_loss(heads, teacher_logits):
        return losses.total_loss(heads, targets, teacher_logits, **options)[0].mean()

    value, (head_grads, teacher_grad) = jax.value_and_grad(mean_loss, argnums=(0, 1))(
        (jnp.asarray(cls), jnp.asarray(dist)), jnp.asarray(teacher)
    )
    heads = [torch.tensor(x, requires_grad=True) for x in (cls, dist)]
    want = torch_training.total_loss(heads, torch.tensor(targets), torch.tensor(teacher), **options)
    want.backward()
    assert value == pytest.approx(want.item(), rel=2e-6)
    for got, head in zip(head_grads, heads, strict=True):
        np.testing.assert_allclose(got, head.grad.numpy(), rtol=2e-5, atol=1e-8)
    assert not np.any(teacher_grad)


def test_parts_and_kind_none():
    loss, parts = total("hard", alpha=0.25)
    assert set(parts) == {"base", "distill"}
    np.testing.assert_allclose(loss, 0.75 * parts["base"] + 0.25 * parts["distill"], rtol=1e-6)
    loss, parts = total("none")
    assert set(parts) == {"base"}
    np.testing.assert_array_equal(loss, parts["base"])

    def label_loss(head):
        heads = (jnp.asarray(STUDENT), head)
        return losses.total_loss(
            heads, mixed_targets(), None, kind="none", alpha=0.5, temperature=1.0
        )[0].mean()

    assert not np.any(jax.grad(label_loss)(jnp.asarray(STUDENT_DIST)))


def test_bfloat16_logits_are_reduced_in_float32():
    low = jnp.asarray(np.random.default_rng(3).normal(size=(3, 1000)) * 5, jnp.bfloat16)
    labels = jnp.array([1, 2, 999])
    for got, want in (
        (losses.cross_entropy(low, labels), losses.cross_entropy(low.astype("float32"), labels)),
        (
            losses.soft_distillation(low, low[::-1], temperature=3.0),
            losses.soft_distillation(
                low.astype("float32"), low[::-1].astype("float32"), temperature=3.0
            ),
        ),
        (
            losses.binary_cross_entropy(low, low[::-1]),
            losses.binary_cross_entropy(low.astype("float32"), low[::-1]),
        ),
    ):
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, want)


def test_large_logits_stay_finite():
    logits = jnp.array([[1e4, -1e4, 0.0]])
    assert losses.cross_entropy(logits, jnp.array([1]))[0] == pytest.approx(2e4)
    distill = losses.soft_distillation(logits, logits[:, ::-1], temperature=1.0)
    assert np.isfinite(distill[0])
    assert losses.binary_cross_entropy(logits, logits < 0)[0] == pytest.approx(
        (2e4 + np.log(2)) / 3
    )


def test_bad_input_is_one_line_that_names_the_field():
    with pytest.raises(InputError, match=r"distill\.kind is 'harder'"):
        total("harder")
    with pytest.raises(InputError, match=r"distill\.reduction is 'mean'"):
        total("soft", reduction="mean")
    with pytest.raises(InputError, match=r"train\.loss is 'focal'"):
        total("none", base_loss="focal")
    heads, options = (jnp.ones((2, 3)),), {"kind": "hard", "alpha": 0.5, "temperature": 1.0}
    with pytest.raises(InputError, match="1 head"):
        losses.total_loss(heads, jnp.ones((2, 3)), jnp.ones((2, 3)), **options)
    with pytest.raises(InputError, match=r"distill\.teacher"):
        losses.total_loss(heads * 2, jnp.ones((2, 3)), None, **options)
