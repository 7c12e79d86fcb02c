"""Converts a large model both ways and loads it, each in a process of its own; prints peak memory.

python tests/convert/peak_memory.py [--model=deit3_huge_patch14_224]

Needs about 8 GB of disk for the huge model.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

_CREATE = """
import sys
import torch
from deit_jax.convert import layouts, mapping
from deit_jax.models import registry
from deit_jax.models.network import split_model

_, like = split_model(registry.abstract_model(sys.argv[1]))
tensors = mapping.tensors_of(like, layouts.REFERENCE)
state = {tensor.key: 0.02 * torch.randn(tensor.shape) for tensor in tensors}
torch.save({"model": state}, sys.argv[2])
"""
_LOAD = """
import sys
import jax
import deit_jax

model = deit_jax.load_model(sys.argv[1])
jax.block_until_ready(model.head.kernel[...])
"""

# A process starts with the peak of the one that started it, so a small one stands between.
_MEASURE = """
import resource, subprocess, sys

status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def peak_gib(*arguments: str) -> float:
    """Runs Python and returns the largest resident set of the process, in GiB."""
    command = [sys.executable, *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    measured = subprocess.run(
        [sys.executable, "-c", _MEASURE, *command], cwd=ROOT, env=env, stdout=subprocess.PIPE
    )
    if measured.returncode:
        sys.exit(f"error: {arguments[0]} failed")
    return int(measured.stdout) / 2**20  # Linux counts in KiB


def measure(model: str) -> dict[str, float]:
    """The peak of each step."""
    with tempfile.TemporaryDirectory() as folder:
        source, target, back = (Path(folder) / name for name in ("a.pth", "model", "b.pth"))
        peak_gib("-c", _CREATE, model, source)
        peaks = {"convert": peak_gib("tools/torch_to_jax.py", "--src", source, "--dst", target)}
        source.unlink()
        peaks["load_model"] = peak_gib("-c", _LOAD, target)
        arguments = ["--src", target, "--dst", back, "--format", "fb"]
        peaks["export"] = peak_gib("tools/jax_to_torch.py", *arguments)
        return peaks


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit3_huge_patch14_224")
    for step, peak in measure(parser.parse_args().model).items():
        print(f"{step}: {peak:.1f} GiB at most")
