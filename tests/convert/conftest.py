"""Small models with weights of full effect, as PyTorch modules and as ours."""

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch

from deit_jax.checkpoints import model_folder
from deit_jax.cli.main import main
from deit_jax.models import registry
from deit_jax.models.info import ModelInfo
from deit_jax.models.network import Variables, split_model
from tests.convert import loopback
from tests.oracles import timm_models

SMALL = (
    *("deit_testing", "deit_testing_distilled", "deit3_testing", "cait_testing"),
    *("parallel_testing", "hmlp_testing", "resmlp_testing", "regnety_testing"),
    *("vit_testing_rope", "vit_testing_rope_mixed_ape"),
)


def options(name: str) -> dict:
    """The structural options of a registered model."""
    return {k: v for k, v in registry.model_options(name).items() if k != "drop_path_mode"}


def timm_twin(name: str, *, num_classes: int = 7, seed: int = 0) -> torch.nn.Module:
    """timm's module of a testing model, randomised, its BatchNorm counters too."""
    model = timm_models.randomise(timm_models.fresh(name, num_classes=num_classes), seed)
    for number, (key, tensor) in enumerate(model.state_dict().items()):
        if key.endswith("num_batches_tracked"):
            tensor.fill_(1000 + number)
    return model


def numpy_state(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {key: tensor.numpy() for key, tensor in module.state_dict().items()}


def save(path, tensors: dict[str, np.ndarray], container: str | None = None):
    """Writes a state dict by the suffix, a .pth perhaps inside a container; returns the path."""
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(tensors, path)
    else:
        state = {key: torch.from_numpy(value) for key, value in tensors.items()}
        content = {container: state, "epoch": 3} if container else state
        torch.save(content, path, _use_new_zipfile_serialization=not path.name.endswith("old.pth"))
    return path


def random_variables(name: str, *, num_classes: int = 7) -> tuple[Variables, ModelInfo]:
    """Our weights of a testing model, drawn by NumPy."""
    network, like = split_model(registry.abstract_model(name, num_classes=num_classes))
    rng = np.random.default_rng(0)
    fill = lambda x: rng.standard_normal(x.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(fill, like), network.info


def random_folder(folder, name: str):
    """A model folder with these weights."""
    model_folder.write_model(folder, *random_variables(name))
    return folder


def command(name: str, src, dst, *more: str) -> int:
    """Runs `deit-jax convert` or `export-torch`."""
    return main([name, "--src", str(src), "--dst", str(dst), *map(str, more)])


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    """Normalised images [2, 32, 32, 3]."""
    return np.random.default_rng(1).standard_normal((2, 32, 32, 3)).astype(np.float32)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture, tmp_path):
    """Runs a command that has to end with status 2, one line, and nothing new; returns the line."""

    def run(*arguments) -> str:
        before, _ = sorted(tmp_path.rglob("*")), capsys.readouterr()
        status = command(*arguments)
        captured = capsys.readouterr()
        lines = captured.err.strip().splitlines()
        assert status == 2, (captured.out, captured.err)
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("error: ")
        assert sorted(tmp_path.rglob("*")) == before  # no folder, not even half of one
        return lines[0]

    return run


@pytest.fixture
def hub(monkeypatch):
    """A server on loopback that speaks the hub's protocol."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with loopback.serve_hub() as server:
        yield server
