"""The teacher as a TPU computes it: the same model, in another form."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from configs import digits_distill
from deit_jax.checkpoints import model_folder
from deit_jax.errors import InputError
from deit_jax.models.network import Variables
from deit_jax.models.regnet_folded import fold
from deit_jax.training import teacher
from deit_jax.training.evaluate import make_eval_step
from tests.training import steps

TPU = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform="tpu")]))


def drawn(name="regnety_testing"):
    """A network, and weights that hide nothing: no batch norm is the identity, no branch is 0."""
    network, variables = steps.new_model(name, seed=1)
    rng = np.random.default_rng(0)
    noise = jax.tree.map(lambda x: rng.uniform(0.1, 0.4, x.shape).astype(np.float32), variables)
    return network, jax.tree.map(jnp.add, variables, noise)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(variables) → a run on a TPU whose teacher has these weights."""
    device = SingleDeviceSharding(jax.devices()[0])
    monkeypatch.setattr(teacher, "replicated", lambda mesh: device)

    def start(network, variables):
        folder = str(tmp_path / "teacher")
        model_folder.write_model(folder, variables, network.info)
        config = digits_distill.get_config()
        config.train.dtype = "bfloat16"
        plan = types.SimpleNamespace(num_classes=10, class_names=())
        return types.SimpleNamespace(mesh=TPU, teacher_folder=folder, config=config, plan=plan)

    return start


@pytest.mark.slow
def test_it_is_folded_when_it_is_loaded(run):
    network, variables = drawn()
    on_tpu = run(network, variables)
    found, weights = teacher.load_teacher(on_tpu)
    assert not weights.batch_stats
    kernel = weights.params["s1"]["b1"]["conv1"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    planned, like = teacher.abstract_teacher(on_tpu)
    assert planned == found
    assert jax.tree.map(jnp.shape, like) == jax.tree.map(jnp.shape, weights)
    images = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
    want = jax.jit(network)(variables, images)[0][0]
    np.testing.assert_allclose(
        jax.jit(found)(weights, images)[0][0], want, atol=3e-2 * np.abs(want).max(), rtol=0
    )


@pytest.mark.parametrize(
    ("name", "platform"), [("deit_testing", "tpu"), ("regnety_testing", "gpu")]
)
def test_others_stay_as_they_are(name, platform):
    mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=platform)]))
    network, variables = steps.new_model(name)
    found = teacher.for_devices(mesh, network, variables)
    assert found[0] is network
    assert found[1] is variables


def test_without_batch_norms_statistics_it_is_refused(run):
    network, variables = drawn()
    with pytest.raises(InputError, match=r"missing batch_stats/s1/b1/conv1/bn/mean"):
        teacher.load_teacher(run(network, Variables(variables.params, {})))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_student_learns_the_same_from_it(kind):
    """One step, in float32; and the evaluation that gives `teacher_top1`."""
    config = digits_distill.get_config()
    config.distill.kind = kind
    config.train.batch_size = 8
    config.optimizer.name = "sgd"
    config.schedule.per_epoch = False
    student = steps.new_model("deit_testing_distilled", depth=1)
    network, variables = drawn()
    batch = steps.new_batch(8, np.random.default_rng(0))
    results = []
    for form in ((network, variables), fold(network, variables, lanes=36)):
        step, state = steps.build(config, *student, teacher=form[0])
        after, metrics = jax.jit(step)(state, form[1], batch)
        sums = jax.jit(make_eval_step(form[0]))(
            {"": form[1]}, batch | {"mask": np.ones(8, np.int32)}
        )
        results.append((after.model.params, metrics, sums))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), results[1], results[0]
    )
