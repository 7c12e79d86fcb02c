"""The train step: what it skips, what it averages, and what it leaves alone."""

import functools
import re
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict

from configs import digits_distill
from deit_jax import trees
from deit_jax.models import registry
from deit_jax.models.network import Network, Variables, split_model
from deit_jax.training.step import make_augment, make_loss
from deit_jax.training.teacher import teacher_forward
from tests.oracles import timm_models, torch_training
from tests.training import steps

KEY = jax.random.key(0)
NAME = "deit_testing_distilled"
SMALL = {"depth": 2, "drop_path_rate": 0.1}


class Parts(NamedTuple):
    """What a step is built from."""

    config: ConfigDict
    network: Network
    variables: Variables
    teacher: Network
    teacher_variables: Variables
    batch: dict


@pytest.fixture(scope="module")
def parts():
    """Soft distillation with every noise on."""
    config = digits_distill.get_config()
    config.distill.kind = "soft"
    config.model.drop_path_rate = 0.1
    config.mixing.random_erasing = 0.25
    config.train.batch_size = 8
    config.schedule.per_epoch = False
    student = steps.new_model("deit_testing_distilled", **SMALL)
    teacher = steps.new_model("regnety_testing", seed=1, depth=4)
    return Parts(config, *student, *teacher, steps.new_batch(8, np.random.default_rng(0)))


def build(parts, **changes):
    """The compiled step and its first state; `changes` are fields, dots written as "__"."""
    config = parts.config.copy_and_resolve_references()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    teacher = None if config.distill.kind == "none" else parts.teacher
    step, state = steps.build(config, parts.network, parts.variables, teacher=teacher)
    return jax.jit(step), state


@pytest.fixture(scope="module")
def engine(parts):
    """The step as it is, its first state, a teacher and a batch."""
    return *build(parts), parts.teacher_variables, parts.batch


def equal(left, right):
    return jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), left, right))


def still(after, state):
    """The names of the parameters that are what they were."""
    before = trees.flat(state.model.params)
    return {k for k, v in trees.flat(after.model.params).items() if jnp.array_equal(v, before[k])}


@pytest.mark.slow
def test_every_part_of_the_state_moves(engine):
    step, state, teacher, batch = engine
    after, metrics = step(step(state, teacher, batch)[0], teacher, batch)
    assert int(after.step) == 2
    assert set(metrics) >= {"teacher_agreement", "learning_rate"}
    for part in ("model", "ema", "opt_state"):
        assert not equal(getattr(after, part), getattr(state, part)), part
    assert not still(after, state)


def test_parameters_that_do_not_train_stay_to_the_bit(parts, engine):
    """Their gradient is cut off in the step: not even the gradient's norm has them."""
    step, state = build(parts, optimizer__trainable=".*/attn/.* head.* pos_embed")
    teacher, batch = parts.teacher_variables, parts.batch
    after, metrics = step(step(state, teacher, batch)[0], teacher, batch)
    names = trees.flat(state.model.params)
    trains = {k for k in names if "/attn/" in k or k.startswith("head") or k == "pos_embed"}
    assert still(after, state) == set(names) - trains
    assert equal(after.ema.params["norm"], state.ema.params["norm"])
    step, state = engine[:2]
    _, full = step(step(state, teacher, batch)[0], teacher, batch)
    assert 0 < float(metrics["grad_norm"]) < float(full["grad_norm"])


@pytest.mark.slow
@pytest.mark.parametrize("base", ["cross_entropy", "bce"])
def test_without_a_teacher_a_distilled_model_learns_as_in_timm(base):
    """timm trains the mean of both heads; gradients of all parameters, in float64 there."""
    options = registry.model_options(NAME) | {"depth": 2, "num_classes": 10}
    options.pop("drop_path_mode", None)
    theirs = timm_models.vit(**options)
    build = functools.partial(registry.create_model, NAME, num_classes=10, depth=2)
    network, variables = split_model(timm_models.with_weights_of(theirs, build))
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, 32, 32, 3)).astype(np.float32)
    targets = rng.dirichlet(np.ones(10), 4).astype(np.float32) * (rng.random((4, 10)) < 0.5)
    config = digits_distill.get_config()
    config.distill.kind, config.train.loss = "none", base
    loss = make_loss(config, network, None)
    gradient = jax.jit(jax.value_and_grad(lambda p: loss(None, p, {}, images, targets, KEY)[0]))
    value, grads = gradient(variables.params)
    logits = theirs.double().train()(torch.from_numpy(images.transpose(0, 3, 1, 2)).double())
    want = torch_training.total_loss(
        (logits,), torch.from_numpy(targets).double(), None, "none", 0, 1, "", base
    )
    want.backward()
    assert float(value) == pytest.approx(want.item(), rel=1e-5)
    wanted = timm_models.to_tree({name: p.grad for name, p in theirs.named_parameters()})
    wanted, found = trees.flat(wanted), trees.flat(grads)
    assert wanted.keys() == found.keys()
    for name, x in wanted.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-3, atol=1e-4 * np.abs(x).max())
    assert np.abs(found["head_dist/kernel"]).max() > 0


@pytest.mark.slow
def test_cosub_trains_two_submodels_of_each_image(parts):
    """Without stochastic depth both are the model: base is that of bce, cosub its own entropy."""
    changes = {"distill__kind": "none", "train__loss": "bce", "mixing__smoothing": 0.0}
    quiet, _ = steps.new_model("deit_testing_distilled", depth=2)
    alone = parts._replace(network=quiet)
    step, state = build(alone, **changes)
    _, plain = step(state, None, parts.batch)
    step, state = build(alone, **changes, train__cosub=True)
    after, metrics = step(state, None, parts.batch)
    assert float(metrics["base"]) == pytest.approx(float(plain["base"]), rel=1e-6)
    both = 0.5 * float(metrics["base"]) + 0.5 * float(metrics["cosub"])
    assert float(metrics["loss"]) == pytest.approx(both, rel=1e-6)
    assert not equal(after.model.params["head"], state.model.params["head"])
    # Each submodel is its own teacher here, so that only the labels move anything.
    assert float(metrics["grad_norm"]) == pytest.approx(0.5 * float(plain["grad_norm"]), rel=1e-4)
    step, state = build(parts, **changes, train__cosub=True)
    _, noisy = step(state, None, parts.batch)
    assert float(noisy["grad_norm"]) != pytest.approx(float(metrics["grad_norm"]), rel=1e-4)


def test_the_step_number_alone_draws_the_noise(engine):
    """The same step repeats itself to the bit; another step with equal weights does not."""
    step, state, teacher, batch = engine
    first, again = step(state, teacher, batch), step(state, teacher, batch)
    assert equal(first[0], again[0])
    _, later = step(state.replace(step=jnp.int32(1)), teacher, batch)
    assert float(later["loss"]) != float(first[1]["loss"])


def test_a_nonfinite_step_is_skipped_and_counted(engine):
    """NaN from the teacher changes nothing but the counters; the next good step resets one."""
    step, state, teacher, batch = engine
    poisoned = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), teacher)
    after, metrics = step(state, poisoned, batch)
    for part in ("model", "ema", "opt_state"):
        assert equal(getattr(after, part), getattr(state, part)), part
    assert not np.isfinite(float(metrics["loss"]))
    assert (int(after.step), int(after.nonfinite_steps), int(after.nonfinite_total)) == (1, 1, 1)
    after, _ = step(after, teacher, batch)
    assert (int(after.step), int(after.nonfinite_steps), int(after.nonfinite_total)) == (2, 0, 1)
    unpoisoned, _ = step(state.replace(step=jnp.int32(1)), teacher, batch)
    assert equal(after.model, unpoisoned.model)


def test_profiles_read_like_the_model(engine):
    """Forward and backward operations carry the names of layers and of the parts of the step."""
    step, *arguments = engine
    lowered = step.lower(*arguments).as_text(debug_info=True)
    for part in ("augment", "teacher/s1/b1/conv2/conv", "loss", "optimizer", "ema", "guard"):
        assert re.search(part.replace("teacher", r"(jvp\()?teacher\)?"), lowered), part
    for layer in ("patch_embed", "blocks/1/attn/qkv", "blocks/0/mlp", "head_dist"):
        assert re.search(rf"(transpose\()?jvp\(student\)+/{layer}", lowered), layer


@pytest.mark.parametrize(("platform", "times"), [("tpu", 1), ("cuda", 0), ("cpu", 0)])
def test_a_tpu_keeps_the_images_as_planes(parts, platform, times):
    plan = types.SimpleNamespace(num_classes=10, group_size=8)
    augment = jax.jit(make_augment(parts.config, plan))
    lowered = augment.trace(KEY, parts.batch).lower(lowering_platforms=(platform,))
    planes = r"@LayoutConstraint\(.*: \(tensor<8x3x32x32xf32>\)"
    assert len(re.findall(planes, lowered.as_text())) == times


def moved(parts, **options):
    """Losses, and how far SGD has moved the parameters, of the student with other options."""
    network, _ = steps.new_model("deit_testing_distilled", **SMALL | options)
    other = parts._replace(network=network)
    sgd = {"optimizer__name": "sgd", "optimizer__lr": 0.05, "schedule__warmup_lr": 0.05}
    step, state = build(other, **sgd)
    losses = []
    for _ in range(3):
        state, metrics = step(state, parts.teacher_variables, parts.batch)
        losses.append(float(metrics["loss"]))
    jaxpr = str(jax.make_jaxpr(step)(state, parts.teacher_variables, parts.batch))
    before = trees.flat(parts.variables.params)
    moves = {name: x - before[name] for name, x in trees.flat(state.model.params).items()}
    return losses, moves, jaxpr


@pytest.fixture(scope="module")
def exact(parts):
    return moved(parts)


@pytest.mark.slow
def test_a_step_in_bfloat16_follows_float32(parts, exact):
    """Losses within 1 %, updates within 10 % in L2: the noise of eight bits of mantissa."""
    losses, moves, _ = moved(parts, dtype="bfloat16")
    assert losses == pytest.approx(exact[0], rel=1e-2)
    assert losses != exact[0]
    error = sum(float(jnp.square(moves[name] - x).sum()) for name, x in exact[1].items())
    assert error < 0.1**2 * sum(float(jnp.square(x).sum()) for x in exact[1].values())


@pytest.mark.slow
def test_remat_changes_no_step(parts, exact):
    """Recomputed blocks, with their stochastic depth, give the same losses and updates."""
    losses, moves, jaxpr = moved(parts, remat=True)
    remats = [text.count("differentiated=True") for text in (exact[2], jaxpr)]
    assert remats == [0, 2]  # one for the backward pass of every block
    assert losses == pytest.approx(exact[0], rel=1e-6)
    for name, want in exact[1].items():
        np.testing.assert_allclose(moves[name], want, atol=1e-4 * float(jnp.abs(want).max()) + 1e-7)


def test_the_teacher_sees_its_own_normalisation():
    """A teacher with another mean and std gets the pixels it would have got on its own."""
    teacher, variables = steps.new_model("regnety_testing")
    info = registry.model_info("deit_testing", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    pixels = np.random.default_rng(0).uniform(size=(2, 32, 32, 3)).astype(np.float32)
    shown = (pixels - np.array(info.mean)) / np.array(info.std)
    own = (pixels - np.array(teacher.info.mean)) / np.array(teacher.info.std)
    expected = teacher(variables, jnp.asarray(own, jnp.float32))[0][0]
    found = teacher_forward(teacher, variables, jnp.asarray(shown, jnp.float32), info)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("student_size", [24, 48])
def test_a_transformer_teacher_sees_its_own_resolution(student_size):
    """The student's images resized as torch's antialiased bicubic does, which is PIL's."""
    teacher, variables = steps.new_model("deit_testing", depth=1)
    info = registry.model_info("deit_testing", image_size=student_size)
    pixels = np.random.default_rng(0).normal(size=(2, student_size, student_size, 3))
    planes = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32))
    resized = torch.nn.functional.interpolate(planes, (32, 32), mode="bicubic", antialias=True)
    expected = teacher(variables, jnp.asarray(resized.numpy().transpose(0, 2, 3, 1)))[0][0]
    found = teacher_forward(teacher, variables, jnp.asarray(pixels, jnp.float32), info)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
