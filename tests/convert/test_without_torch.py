"""`.safetensors` need no torch; a `.pth` says so in one line where there is none."""

import pytest
import safetensors.numpy

from tests.convert.conftest import numpy_state, save, timm_twin
from tests.test_without_tensorflow import block

_PROGRAM = """
    import os
    import deit_jax
    from deit_jax.cli.main import main

    def command(name, src, dst, *more):
        return main([name, "--src", src, "--dst", dst, *more])

    os.chdir(sys.argv[1])
    assert command("convert", "a.safetensors", "model") == 0
    assert deit_jax.load_model("model").info.name == "deit_testing_distilled"
    for form, name in (("timm", "b.safetensors"), ("fb", "c.safetensors"), ("hf", "hf")):
        assert command("export-torch", "model", name, "--format", form) == 0
    assert command("convert", "hf", "model2") == 0
    assert command("convert", "a.pth", "model3") == 2
    assert command("export-torch", "model", "b.pth", "--format", "timm") == 2
"""


@pytest.mark.slow
def test_safetensors_both_ways_without_torch(run_python, tmp_path):
    arrays = numpy_state(timm_twin("deit_testing_distilled"))
    sources = [save(tmp_path / name, arrays) for name in ("a.safetensors", "a.pth")]
    blocked = ("torch", "torchvision", "timm", "transformers", "tensorflow")
    finished = run_python("-c", block(_PROGRAM, blocked), tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    errors = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert all("pip install 'deit-jax[torch]'" in line for line in errors)
    back = safetensors.numpy.load_file(tmp_path / "b.safetensors")
    assert all((back[key] == value).all() for key, value in arrays.items())
    written = {"model", "model2", "b.safetensors", "c.safetensors", "hf"}
    assert {path.name for path in tmp_path.iterdir()} == written | {path.name for path in sources}
