"""State sharded over fsdp, and checkpoints that go on over other devices and processes."""

import concurrent.futures
import dataclasses
import re

import pytest

from deit_jax.parallel.mesh import make_mesh
from tests import several


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trained(root, run_device_check):
    """What training over 8 × 1, 2 × 4 and 1 × 8 devices found."""
    return run_device_check("shard", root)


@pytest.mark.slow
def test_the_mesh_does_not_change_the_losses(trained):
    """Within 1e-5, with all that is drawn, a teacher, clipping and LAMB's norms."""
    one = trained["losses"]["1"]
    assert len(one) == 6
    assert one[-1] < one[0] - 0.1
    assert trained["losses"]["8"] == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_every_device_holds_its_share_of_the_large_arrays(trained):
    """The MLPs' kernels, which alone are large here: weights, two moments and the EMA."""
    large = [n for name, n in trained["arrays"].items() if re.search(r"fc\d/kernel$", name)]
    assert len(large) == 16
    rest = sum(trained["arrays"].values()) - sum(large)
    for fsdp in (1, 4, 8):
        share = rest + sum(large) // fsdp
        assert trained["bytes"][str(fsdp)] == [share] * 8
        assert f"state     {share / 2**20:,.1f} MiB on each" in trained["summary"][str(fsdp)]
    whole = f"of {sum(trained['arrays'].values()) / 2**20:,.1f} in all"
    assert whole in trained["summary"]["8"]
    assert " in all" not in trained["summary"]["1"]


@pytest.mark.slow
def test_a_checkpoint_goes_on_over_another_mesh(trained):
    """Saved on 8 × 1, read on 2 × 4: the same bits, and the losses of the run that went on."""
    assert trained["restored"] == trained["state"]
    assert "resumed at step 3" in trained["summary"]["4"]
    assert "data 2 × fsdp 4" in trained["summary"]["4"]
    assert trained["losses"]["4"] == pytest.approx(trained["losses"]["1"][3:], rel=1e-5)


@pytest.mark.slow
def test_a_checkpoint_moves_between_processes(trained, root, run_device_check):
    """8 devices of one process → one of one, and → 4 of two → one: the same bits, and losses."""
    coordinator = f"127.0.0.1:{several.free_port()}"

    def process(number):
        return run_device_check("restore", root, "saved", 4, coordinator, number, devices=2)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        both = list(pool.map(process, (0, 1)))
    assert "fsdp 4 on 4 cpu device(s), 2 process(es)" in both[0]["summary"]
    alone = [run_device_check("restore", root, name, 1, devices=1) for name in ("saved", "by_two")]
    for one in alone:
        assert "fsdp 1 on 1 cpu device(s), 1 process(es)" in one["summary"]
    for found in (*both, *alone):
        assert "resumed at step 3" in found["summary"]
        assert ", in groups of 8; " in found["summary"]
        assert found["state"] == trained["state"]
        assert found["losses"] == pytest.approx(trained["losses"]["1"][3:], rel=1e-5)


@pytest.mark.slow
def test_one_all_reduce_and_nothing_else(root, run_device_check):
    """Distillation with every augmentation on: gradients and metrics share one all-reduce.

    The check can fail: sharded parameters are gathered in the step.
    """
    env = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}  # fusing all-reduces is an optimisation
    found = run_device_check("collectives", root, **env)
    assert found["1"] == {"all-reduce": 1}
    assert found["8"]["all-gather"] > 0


BATCH_NORM_OVER_FSDP = """
import jax, numpy as np
from configs import digits
from deit_jax import trees
from deit_jax.parallel.mesh import batch_sharding, make_mesh, replicated, state_shardings
from tests.training import steps

config = digits.get_config()
config.optimizer.name, config.optimizer.lr, config.schedule.warmup_lr = "sgd", 0.05, 0.05
network, variables = steps.new_model("regnety_testing", depth=4)
batch = steps.new_batch(16, np.random.default_rng(0))
mesh = make_mesh(fsdp=2)
everywhere = replicated(mesh)
one, start = steps.build(config, network, variables)
four, _ = steps.build(config, network, variables, replicated=everywhere)
shardings = state_shardings(mesh, start)
assert any("fsdp" in s.spec for s in jax.tree.leaves(shardings))
one = jax.jit(one)
four = jax.jit(
    four,
    in_shardings=(shardings, everywhere, batch_sharding(mesh)),
    out_shardings=(shardings, everywhere),
)
state, other = start, jax.device_put(start, shardings)
for _ in range(2):
    state, metrics = one(state, None, batch)
    other, again = four(other, None, batch)
    np.testing.assert_allclose(again["loss"], metrics["loss"], rtol=1e-5)
before, found = trees.flat(start.model), trees.flat(jax.device_get(other.model))
for name, want in trees.flat(state.model).items():
    step = np.abs(want - before[name]).max()
    np.testing.assert_allclose(found[name], want, rtol=1e-4, atol=1e-3 * step, err_msg=name)
"""


@pytest.mark.slow
def test_batch_norm_trains_over_fsdp_as_on_one_device(run_on_devices):
    """Weights and running statistics of a RegNetY after two steps, over 2 × 2 devices."""
    run_on_devices("-c", BATCH_NORM_OVER_FSDP, devices=4)


@dataclasses.dataclass(frozen=True)
class _Device:
    """What a mesh asks of a device."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "made up"


def test_a_mesh_of_several_hosts_is_in_the_order_of_processes():
    """Also where every host is a slice of its own, as GPUs are, and JAX lists them otherwise."""
    devices = [_Device(number, number // 2, number // 2) for number in (2, 0, 3, 1)]
    mesh = make_mesh(2, devices)
    assert [device.id for device in mesh.devices.flat] == [0, 1, 2, 3]
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2}


@pytest.mark.slow
def test_kernels_run_on_each_device_with_its_own_rows(run_device_check, tmp_path):
    """Pallas kernels for TPUs, interpreted: over a 2 × 4 mesh and under pmap, in micro-batches."""
    found = run_device_check("kernels", tmp_path)
    assert found["xla"] != found["mesh"]  # the kernels ran
    assert found["mesh"] == pytest.approx(found["pmap"], rel=1e-5)
    assert found["mesh"] == pytest.approx(found["xla"], rel=5e-3)
