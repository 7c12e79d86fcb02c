"""Compares our models with PyTorch's, from equal weights on equal images, in float32.

python tools/verify_parity.py --all --write docs/parity.md
python tools/verify_parity.py deit_tiny_patch16_224 regnety_002

For every name: timm's module (deit3_tiny, which timm lacks: an independent module of ours) with
random weights, every tensor large enough to matter; its state dict goes through the converter.
Four random and four real images (--images, a folder of JPEGs) go through both. Needs the extra
`test` (torch, timm). Exits with 1 if a difference exceeds its limit.
"""

import argparse
import datetime
import gc
import os
import platform
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from deit_jax import trees  # noqa: E402
from deit_jax.cli.status import exit_status  # noqa: E402
from deit_jax.convert import from_torch  # noqa: E402
from deit_jax.errors import InputError  # noqa: E402
from deit_jax.inference.preprocess import preprocess  # noqa: E402
from deit_jax.models import registry  # noqa: E402
from tests.oracles import reference_vit, timm_models  # noqa: E402

_SAMPLE = os.environ.get("DEIT_JAX_IMAGE_SAMPLE", ROOT.parent / "shared/data/imagenet_sample")
_PACKAGES = ("jax", "jaxlib", "flax", "torch", "timm", "numpy", "pillow")
_NAMES = [name for name in registry.list_models() if "testing" not in name]


class Row(NamedTuple):
    """Largest absolute differences of a model, relative to the largest value of PyTorch's."""

    name: str
    parameters: int
    logits: float
    features: float
    limit: float

    def __str__(self) -> str:
        return (
            f"| {self.name} | {self.parameters:,} | {self.logits:.1e} | {self.features:.1e} | "
            f"{self.limit:.0e} |"
        )


def torch_module(name: str) -> torch.nn.Module:
    """The oracle of a registered model, randomised, in evaluation mode."""
    import timm  # after the oracles have prepared torchvision

    if timm.is_model(name):
        return timm_models.randomise(timm.create_model(name), seed=0)
    options = {
        key: value for key, value in registry.model_options(name).items() if key != "drop_path_mode"
    }
    return timm_models.randomise(reference_vit.ReferenceVit(**options), seed=0)


def compare(name: str, pictures: list[Path], *, num_random: int = 4) -> Row:
    """Runs both models.

    Args:
      name: of a registered model.
      pictures: image files, which go through our evaluation preprocessing.
      num_random: images of normal noise besides.
    """
    oracle = torch_module(name)
    state = {key: tensor.numpy() for key, tensor in oracle.state_dict().items()}
    converted = from_torch.from_tensors(state, what=name)
    info = converted.info
    if info.name != name:
        raise InputError(f"the weights of {name} were taken for {info.name}")
    images = inputs(info, pictures, num_random)

    with torch.no_grad():
        batch = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        tokens = oracle.forward_features(batch)
        if hasattr(oracle, "forward_head"):
            logits = oracle.forward_head(tokens)
        else:
            logits = oracle(batch)
        want = logits.numpy(), tokens.numpy()
    if want[1].ndim == 4:  # a convolutional map, NCHW
        want = want[0], want[1].transpose(0, 2, 3, 1)
    del oracle

    model = converted.model()
    both = jax.jit(lambda model, x: (model(x), model.forward_features(x)))
    got = jax.device_get(both(model, images))
    errors = [float(np.abs(g - w).max() / np.abs(w).max()) for g, w in zip(got, want, strict=True)]
    limit = 1e-4 if "large" in name or "huge" in name else 2e-5
    return Row(name, trees.param_count(converted.variables.params), *errors, limit)


def inputs(info: registry.ModelInfo, pictures: list[Path], num_random: int) -> np.ndarray:
    """Normalised images [B, H, W, 3]: noise, then the pictures."""
    size = info.image_size
    noise = np.random.default_rng(0).standard_normal((num_random, size, size, 3), np.float32)
    return np.concatenate([noise, *(preprocess(info, file) for file in pictures)])


def _pictures(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".jpeg", ".jpg"))
    if len(files) < 4:
        raise InputError(f"--images {folder}: {len(files)} JPEG files in it, expected at least 4")
    return files[:: len(files) // 4][:4]


def _report(rows: list[Row]) -> Iterator[str]:
    versions = ", ".join(f"{package} {version(package)}" for package in _PACKAGES)
    yield "# Parity with PyTorch"
    yield ""
    yield "Largest absolute difference in float32 between our model and the PyTorch module,"
    yield "relative to the largest absolute value, over 4 random and 4 real images; random weights"
    yield "and statistics, every tensor large enough to matter. The oracle is timm's module; for"
    yield "`deit3_tiny_patch16_224`, which timm lacks, an independent PyTorch module."
    yield ""
    yield "`python tools/verify_parity.py --all --write docs/parity.md`"
    yield ""
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    yield f"{datetime.date.today()}, {machine}, Python {platform.python_version()};"
    yield f"{versions}."
    yield ""
    yield "| model | parameters | logits | forward_features | limit |"
    yield "|---|---|---|---|---|"
    yield from map(str, rows)


def run(arguments: argparse.Namespace) -> int:
    """Compares the models asked for and prints a table row for each."""
    if bool(arguments.names) == arguments.all:
        raise InputError("name models, or pass --all, and not both")
    names = _NAMES if arguments.all else arguments.names
    for name in names:
        registry.model_options(name)
    pictures = _pictures(arguments.images)
    if arguments.write:  # a place that cannot be written shows now, not after half an hour
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        arguments.write.touch()
    rows = []
    for number, name in enumerate(names, start=1):
        start = time.monotonic()
        rows.append(compare(name, pictures))
        gc.collect()  # the large models do not fit twice
        jax.clear_caches()
        seconds = time.monotonic() - start
        print(f"{rows[-1]} {number}/{len(names)}, {seconds:.0f} s", flush=True)
    bad = [row.name for row in rows if not (row.logits <= row.limit and row.features <= row.limit)]
    if arguments.write:
        arguments.write.write_text("\n".join(_report(rows)) + "\n", encoding="utf-8")
    print(f"beyond the limit: {', '.join(bad)}" if bad else f"all {len(rows)} within their limits")
    return 1 if bad else 0


def main(argv: list[str] | None = None) -> int:
    """Compares; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="registered models")
    parser.add_argument("--all", action="store_true", help="every model but the testing ones")
    parser.add_argument("--images", type=Path, default=_SAMPLE, help="folder of JPEGs")
    parser.add_argument("--write", type=Path, help="Markdown file for the table")
    arguments = parser.parse_args(argv)
    return exit_status(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
