"""`.safetensors` need no torch; a `.pth` says so in one line where there is none."""

import safetensors.numpy

from tests.convert.conftest import numpy_state, save, timm_twin

_BLOCK = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "torchvision", "timm", "transformers", "tensorflow"}:
            return None
        return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


def test_safetensors_both_ways_without_torch(run_python, tmp_path):
    arrays = numpy_state(timm_twin("deit_testing_distilled"))
    save(tmp_path / "a.safetensors", arrays)
    save(tmp_path / "a.pth", arrays)
    program = _BLOCK + (
        """
folder = sys.argv[1]
try:
    import torch
except ModuleNotFoundError:
    print("no torch")
import deit_jax
from deit_jax.cli.main import main

assert main(["convert", "--src", folder + "/a.safetensors", "--dst", folder + "/model"]) == 0
assert deit_jax.load_model(folder + "/model").info.name == "deit_testing_distilled"
for form, name in (("timm", "b.safetensors"), ("fb", "c.safetensors"), ("hf", "hf")):
    arguments = ["--src", folder + "/model", "--dst", f"{folder}/{name}", "--format", form]
    assert main(["export-torch", *arguments]) == 0
assert main(["convert", "--src", folder + "/hf", "--dst", folder + "/model2"]) == 0
assert main(["convert", "--src", folder + "/a.pth", "--dst", folder + "/model3"]) == 2
arguments = ["--src", folder + "/model", "--dst", folder + "/b.pth", "--format", "timm"]
assert main(["export-torch", *arguments]) == 2
assert "torch" not in sys.modules
"""
    )
    finished = run_python("-c", program, str(tmp_path))
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.startswith("no torch")
    errors = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert all("pip install 'deit-jax[torch]'" in line for line in errors)
    back = safetensors.numpy.load_file(tmp_path / "b.safetensors")
    assert all((back[key] == value).all() for key, value in arrays.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["a.safetensors", "a.pth", "model", "model2", "b.safetensors", "c.safetensors", "hf"]
    )
