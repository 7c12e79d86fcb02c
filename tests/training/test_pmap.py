"""The training step under jax.pmap over eight CPU devices, beside the one over the mesh."""

import pytest

from configs import digits
from deit_jax.config.validate import validate
from deit_jax.errors import InputError


@pytest.fixture(scope="module")
def found(tmp_path_factory, run_device_check):
    return run_device_check("pmap", tmp_path_factory.mktemp("runs"))


@pytest.mark.slow
def test_both_backends_train_alike(found):
    """Twenty losses within 1e-6: erasing, mixing, drop-path and micro-batches draw the same."""
    jit, pmap = found["losses"]["jit"], found["losses"]["pmap"]
    assert len(jit) == 20
    assert jit[-1] < jit[0] - 0.3
    assert pmap == pytest.approx(jit, rel=1e-6)
    assert "step under pmap" in found["summary"]["pmap"]
    assert "pmap" not in found["summary"]["jit"]


@pytest.mark.slow
def test_a_checkpoint_goes_on_under_the_other(found):
    """Saved after ten steps of one backend, ten more of the other."""
    for backend in ("jit", "pmap"):
        assert found["continued"][backend] == pytest.approx(found["losses"]["jit"][10:], rel=1e-6)


@pytest.mark.slow
def test_the_state_is_donated_and_batch_norm_sees_the_whole_batch(found):
    """Output, gradient and running statistics, where no device's images are like the others'."""
    assert found["donated"]
    assert found["batch_norm"] < 1e-5


@pytest.mark.parametrize(("field", "backend"), [("fsdp", "pmap"), ("backend", "shmap")])
def test_what_pmap_cannot_do_is_refused(field, backend):
    config = digits.get_config()
    config.parallel.backend, config.parallel.fsdp = backend, 2
    with pytest.raises(InputError, match=f"config.parallel.{field} is"):
        validate(config)
