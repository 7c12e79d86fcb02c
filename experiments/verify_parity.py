"""Compares our models with PyTorch's, from equal weights on equal images, in float32.

python -m experiments.verify_parity --write docs/parity.md
python -m experiments.verify_parity deit_tiny_patch16_224 regnety_002

For every name: timm's module (deit3_tiny, ViT-5 and others, which timm lacks: modules of ours) with
random weights, every tensor large enough to matter; its state dict goes through the converter.
Four random and four real images (--images, a folder of JPEGs) go through both. Needs the extra
`test` (torch, timm). Exits with 1 if a difference exceeds its limit. With --keep FILE, a comparison
that ends early goes on where it was; the largest models come last.
"""

import gc
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import torch

from deit_jax import trees
from deit_jax.cli.arguments import Parser, new_file
from deit_jax.cli.status import exit_status
from deit_jax.convert import from_torch
from deit_jax.errors import InputError
from deit_jax.inference.preprocess import preprocess
from deit_jax.models import figures, registry
from deit_jax.planning.markdown import head, origin, processor, publish, table
from tests.oracles import reference_vit, timm_models

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "timm", "numpy", "pillow")
_BESIDE = Path(__file__).resolve().parents[2] / "shared/data/imagenet_sample"


class Row(NamedTuple):
    """Largest absolute differences of a model, relative to the largest value of PyTorch's."""

    name: str
    parameters: int
    logits: float
    features: float
    limit: float

    @property
    def within_limits(self) -> bool:
        """Whether the models agree; a NaN does not."""
        return self.logits <= self.limit and self.features <= self.limit

    def cells(self) -> tuple[str, ...]:
        """Returns the text of the row."""
        errors = (f"{self.logits:.1e}", f"{self.features:.1e}", f"{self.limit:.0e}")
        return (self.name, f"{self.parameters:,}", *errors)


def torch_module(name: str) -> torch.nn.Module:
    """Returns the oracle of a registered model, randomised, in evaluation mode."""
    import timm  # after the oracles have prepared torchvision

    if timm.is_model(name):
        return timm_models.randomise(timm.create_model(name), seed=0)
    options = registry.model_options(name)
    options.pop("drop_path_mode")
    if options.get("rope") == "vit5":
        return timm_models.randomise(timm_models.fresh(name, num_classes=1000), seed=0)
    options["parallel"] = registry.family(name) == "parallel"
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
    converted = from_torch.from_tensors(state, what=name, model=name)
    info = converted.info
    if info.name != name:
        raise InputError(f"the weights of {name} were taken for {info.name}")
    noise = np.random.default_rng(0).standard_normal(
        (num_random, info.image_size, info.image_size, 3), np.float32
    )
    images = np.concatenate([noise, *(preprocess(info, file) for file in pictures)])

    with torch.no_grad():
        batch = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        tokens = oracle.forward_features(batch)
        again = hasattr(oracle, "forward_head")
        logits = oracle.forward_head(tokens) if again else oracle(batch)
        if tokens.ndim == 4:  # a convolutional map, NCHW
            tokens = tokens.permute(0, 2, 3, 1)
        want = logits.numpy(), tokens.numpy()
    del oracle

    both = jax.jit(lambda model, x: (model(x), model.forward_features(x)))
    got = jax.device_get(both(converted.model(), images))
    errors = [float(np.abs(g - w).max() / np.abs(w).max()) for g, w in zip(got, want, strict=True)]
    size = trees.param_count(converted.variables.params)
    return Row(name, size, *errors, 1e-4 if size > 200e6 else 2e-5)


def _pictures(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".jpeg", ".jpg"))
    if len(files) < 4:
        raise InputError(f"--images {folder}: {len(files)} JPEG files in it, expected at least 4")
    return files[:: len(files) // 4][:4]


def finish(rows: list, columns: tuple, command: str, file: Path | None, *more: str) -> int:
    """Prints the table below `more`, also into `file`; returns 1 where a row is beyond a limit."""
    section = head("Differences", command, origin(*_PACKAGES), processor())
    publish([*section, *more, *table(*columns, rows=(row.cells() for row in rows))], file)
    bad = [row.name for row in rows if not row.within_limits]
    print(f"beyond the limits: {', '.join(bad)}" if bad else f"all {len(rows)} within the limits")
    return 1 if bad else 0


def _run(argv: list[str]) -> int:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("names", nargs="*", help="registered models (default: all but the testing ones)")
    images = os.environ.get("DEIT_JAX_IMAGE_SAMPLE", _BESIDE)
    add("--images", type=Path, default=images, help="folder of JPEGs")
    add("--write", type=new_file, metavar="FILE", help="also put the table into this file")
    add("--keep", type=Path, metavar="FILE", help="add each row to this file; repeat none in it")
    arguments = parser.parse_args(argv)
    names = arguments.names or registry.list_models()
    for name in names:
        registry.model_options(name)  # raises for an unknown name
    pictures = _pictures(arguments.images)
    rows, kept = {}, arguments.keep
    if kept and kept.exists():
        found = [Row(**json.loads(line)) for line in kept.read_text().splitlines()]
        rows = {row.name: row for row in found if row.name in names}
    sizes = {name: row.gmacs for name, row in figures.FIGURES.items()}  # without the testing ones
    for name in sorted(set(names) - set(rows), key=lambda name: sizes.get(name, 0.0)):
        start = time.monotonic()
        rows[name] = row = compare(name, pictures)
        if kept:
            with kept.open("a") as file:
                print(json.dumps(row._asdict()), file=file)
        gc.collect()  # the large models do not fit twice
        jax.clear_caches()
        seconds = time.monotonic() - start
        print(*row.cells(), f"{len(rows)}/{len(names)}, {seconds:.0f} s", flush=True)
    command = f"python -m experiments.verify_parity {shlex.join(argv)}"
    columns = ("model", "parameters", "logits", "forward_features", "limit")
    return finish([rows[name] for name in names], columns, command, arguments.write)


def main(argv: list[str] | None = None) -> int:
    """Compares, prints a row for each model, and returns the exit status."""
    return exit_status(lambda: _run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
