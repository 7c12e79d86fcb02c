"""Ten steps of every kind of training beside the reference's; the tool does the real models."""

import numpy as np
import pytest
import torch

from deit_jax import trees
from deit_jax.convert import mapping, to_torch
from deit_jax.models import registry
from deit_jax.models.network import split_model
from deit_jax.training import optim
from experiments import verify_training
from tests.oracles import timm_models, torch_training

MODELS = {
    "deit": "deit_testing",
    "distilled": "deit_testing_distilled",
    "deit3": "deit3_testing",
    "rope": "vit_testing_rope_mixed_ape",
    "vit5": "vit5_testing",
    "cait": "cait_testing",
}


def compare(case: str) -> verify_training.Row:
    student = MODELS[verify_training.CASES[case].student]
    small = {"num_steps": 10, "image_size": 16, "batch_size": 8, "depth": 2}
    return verify_training.compare(case, student, "regnety_testing", **small)


@pytest.mark.slow
@pytest.mark.parametrize("case", verify_training.CASES)
def test_training_is_the_reference_step_by_step(case):
    row = compare(case)
    assert row.within_limits
    # In so few steps there is no more than rounding, while loss and weights moved.
    assert row.worst < 1e-5
    assert row.errors["effective"] < 2e-6
    assert row.moved > 1e-2
    assert row.losses[-1] < 0.95 * row.losses[0]


def test_a_run_beyond_a_limit_is_named(monkeypatch, tmp_path, capsys):
    beyond = [("weights", np.nan), ("ema", 2e-3), ("rate", 1e-8), ("effective", 2e-4)]
    beyond += [("last", 2e-3), ("first", 2e-5), ("rate", np.nan)]
    rows = []
    for case, (field, value) in zip(verify_training.CASES, beyond, strict=True):
        errors = dict.fromkeys(verify_training.LIMITS, 0.0)
        rows.append(verify_training.Row(case, "deit_testing", np.ones(2), 0.0, 0.1, errors))
        assert rows[-1].within_limits
        errors[field] = value
    left = iter(rows)
    monkeypatch.setattr(verify_training, "compare", lambda *_, **__: next(left))
    report = tmp_path / "report.md"
    assert verify_training.main(["--write", str(report)]) == 1
    assert f"beyond the limits: {', '.join(verify_training.CASES)}" in capsys.readouterr().out
    assert "| DeiT III | deit_testing | 1.0000 → 1.0000 |" in report.read_text()
    assert verify_training.main(["--steps", "15"]) == 2
    assert "--steps" in capsys.readouterr().err


VITS = [name for name in registry.names_of() if "embed_dim" in registry.model_options(name)]


@pytest.mark.parametrize("name", VITS)
def test_the_parameters_that_decay_are_the_references(name):
    """By PyTorch's names; two blocks stand for all."""
    _, like = split_model(registry.abstract_model(name, depth=2))
    layout = to_torch.layout(registry.model_info(name), "fb" if "vit5" in name else "timm")
    tensors = mapping.tensors_of(like, layout)
    keys = {tensor.leaf: tensor.key for tensor in tensors if tensor.leaf.startswith("params/")}
    with torch.device("meta"):
        oracle = timm_models.fresh(name, num_classes=1000, depth=2)

    def decayed(**more) -> set[str]:
        mask = trees.flat(optim.decay_mask(like.params, **more))
        return {keys[f"params/{leaf}"] for leaf, decays in mask.items() if decays}

    assert len(keys) == len(list(oracle.parameters()))
    # [1, 1, D] in timm alone, which so decays them.
    rows = {name for name, _ in oracle.named_parameters() if name.endswith(("alpha", "beta"))}
    assert decayed() == torch_training.decayed_names(oracle) - rows
    undecayed = oracle.no_weight_decay() if hasattr(oracle, "no_weight_decay") else ()
    of_timm = torch_training.decayed_names(oracle, undecayed) - rows
    assert decayed(decay_dist_token=False) == of_timm
    assert ("dist_token" in decayed() - of_timm) == registry.is_distilled(name)
