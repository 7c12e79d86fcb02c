"""What couplings.py knows about its libraries still holds.

Its barrier is tested by tests/checkpoints/test_recovery.py, where a process cannot save.
"""

import logging
import sys

import pytest
import tensorstore

from deit_jax import couplings
from tests import several

# One process is enough of a cluster for JAX's store of keys and values.
CONNECTED = """
import sys, jax
from deit_jax import couplings
try:
    jax.distributed.initialize()
except Exception as error:
    assert couplings.is_no_cluster(error), repr(error)
state = couplings.distributed_state()
assert (state.num_processes, state.process_id, state.coordinator_address) == (1, 0, None)
jax.distributed.initialize(sys.argv[1], num_processes=1, process_id=0)
assert state.coordinator_address == sys.argv[1]
store = couplings.store()
store.key_value_set("folder/0", "zero")
assert store.blocking_key_value_get("folder/0", 1000) == "zero"
assert [text for _, text in store.key_value_dir_get("folder/")] == ["zero"]
assert store.key_value_dir_get("another/") == []
store.wait_at_barrier("barrier", 1000)
for mistake in (lambda: store.key_value_set("folder/0", "one"),
                lambda: store.blocking_key_value_get("nothing", 10)):
    try:
        mistake()
    except jax.errors.JaxRuntimeError:
        continue
    raise AssertionError(mistake)
"""


def test_names_of_jax(run_python):
    ended = run_python("-c", CONNECTED, f"127.0.0.1:{several.free_port()}")
    assert ended.returncode == 0, ended.stderr


def test_tpus_are_counted():
    assert couplings.count_tpus() >= 0


def test_the_system_s_refusals_behind_other_errors():
    number = 20  # ENOTDIR
    with pytest.raises(ValueError) as caught:
        tensorstore.KvStore.open("file:///dev/null/x/").result().write("key", b"").result()
    assert couplings.system_errno(caught.value) == number
    assert couplings.system_errno(OSError(number, "text")) == number
    caused = Exception("of Orbax")
    caused.__cause__ = caught.value
    assert couplings.system_errno(caused) == number
    assert couplings.system_errno(ValueError("another")) is None


def test_jax2onnx_is_quick_and_quiet():
    from jax2onnx.converter import ir_optimizations

    search = ir_optimizations.remove_redundant_reshape_pairs_ir
    assert "remove_redundant_reshape_pairs_ir" in ir_optimizations.optimize_graph.__code__.co_names
    with couplings.converting_to_onnx():
        assert ir_optimizations.remove_redundant_reshape_pairs_ir(None) is None
        assert not logging.getLogger("jax2onnx.plugins").isEnabledFor(logging.WARNING)
    assert ir_optimizations.remove_redundant_reshape_pairs_ir is search
    assert logging.getLogger("jax2onnx.plugins").isEnabledFor(logging.WARNING)


def test_orbax_is_silenced(monkeypatch):
    absl = logging.getLogger("absl")
    monkeypatch.setattr(absl, "filters", [])
    monkeypatch.setattr(logging.getLogger("asyncio"), "level", logging.WARNING)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    couplings.silence_orbax()

    def record(path, level, text):
        return absl.makeRecord("absl", level, path, 1, text, (), None)

    assert not absl.filter(record("x/orbax/y.py", logging.ERROR, "a save has failed"))
    gone = "Metadata file does not exist: %s"  # where a workdir is removed during a save
    assert not absl.filter(record("x/orbax/y.py", logging.WARNING, gone))
    left = "Attempted to create temporary directory %s which already exists."  # of a killed save
    assert not absl.filter(record("x/orbax/y.py", logging.WARNING, left))
    assert absl.filter(record("x/orbax/y.py", logging.WARNING, "another"))
    assert absl.filter(record("deit_jax/y.py", logging.ERROR, "ours"))
