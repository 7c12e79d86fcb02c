"""Small models with weights of full effect, as PyTorch modules and as ours."""

from collections.abc import Callable

import jax
import numpy as np
import pytest
import torch

from deit_jax.models import registry
from deit_jax.models.network import Variables, split_model
from deit_jax.models.registry import ModelInfo
from tests.oracles import timm_models

SMALL = ("deit_testing", "deit_testing_distilled", "deit3_testing", "regnety_testing")


def options(name: str) -> dict:
    """The structural options of a registered model."""
    return {k: v for k, v in registry.model_options(name).items() if k != "drop_path_mode"}


def timm_twin(name: str, *, num_classes: int = 7, seed: int = 0) -> torch.nn.Module:
    """timm's module of a testing model, randomised, its BatchNorm counters too."""
    chosen = options(name)
    if "w0" in chosen:
        del chosen["image_size"]
        model = timm_models.regnety(seed=seed, num_classes=num_classes, **chosen)
    else:
        model = timm_models.vit(seed=seed, num_classes=num_classes, **chosen)
    for number, (key, tensor) in enumerate(model.state_dict().items()):
        if key.endswith("num_batches_tracked"):
            tensor.fill_(1000 + number)
    return model


def random_variables(name: str, *, num_classes: int = 7) -> tuple[Variables, ModelInfo]:
    """Our weights of a testing model, drawn by NumPy."""
    network, like = split_model(registry.abstract_model(name, num_classes=num_classes))
    rng = np.random.default_rng(0)
    fill = lambda x: rng.standard_normal(x.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(fill, like), network.info


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    """Normalised images [2, 32, 32, 3]."""
    return np.random.default_rng(1).standard_normal((2, 32, 32, 3)).astype(np.float32)


@pytest.fixture
def one_error_line(capsys: pytest.CaptureFixture) -> Callable[[int], str]:
    """Checks that a tool ended with status 2 and one line of error, and returns the line."""

    def check(status: int) -> str:
        captured = capsys.readouterr()
        lines = captured.err.strip().splitlines()
        assert status == 2, (captured.out, captured.err)
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("error: ")
        return lines[0]

    return check
