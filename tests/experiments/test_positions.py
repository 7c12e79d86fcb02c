"""The comparison of positions: which runs and evaluations it makes, and its table."""

import pytest

from deit_jax import trees
from deit_jax.config.files import write_config
from deit_jax.config.plan import plan_run
from deit_jax.config.validate import validate
from deit_jax.models.network import split_model
from deit_jax.training.run import build_model
from experiments import positions


@pytest.fixture
def runs(monkeypatch):
    """What was trained and evaluated: (workdir, options, image size)."""
    made = []

    def noted(config, workdir):
        made.append((workdir, config.model.options, config.input.image_size))
        if not config.init_from:
            write_config(config, workdir)
        return {"top1": 50.0 + config.train.seed - config.input.image_size / 4}

    monkeypatch.setattr(positions.loop, "train", noted)
    monkeypatch.setattr(positions.loop, "evaluate", noted)
    return made


def test_runs_and_table(runs, tmp_path, capsys):
    flags = [f"--data={tmp_path}", f"--workdir={tmp_path}/runs", "--seeds", "1", "2"]
    assert positions.main([*flags, "--epochs=9"]) == 0
    row = "| RoPE axial | `rope=axial pos_embed=False` | 43.50 | 39.50 "
    row += "| 43.00 → 39.00; 44.00 → 40.00 |"
    assert row in capsys.readouterr().out.splitlines()
    assert len(runs) == 2 * 2 * len(positions.MODELS)
    seed = tmp_path / "runs" / "seed2" / "RoPE_mixed"
    assert (str(seed), "rope=mixed pos_embed=False", 32) in runs
    assert (str(seed / "at_48"), "rope=mixed pos_embed=False", 48) in runs
    assert positions.main([*flags, "--epochs=9"]) == 0
    assert row in capsys.readouterr().out.splitlines()
    assert len(runs) == 2 * 2 * len(positions.MODELS), "what is kept is not made again"
    (page := tmp_path / "page.md").write_text("before\n<!-- positions -->\n", encoding="utf-8")
    assert positions.main([*flags, "--epochs=7", f"--write={page}"]) == 2
    assert "<!-- end of positions -->" in capsys.readouterr().err
    assert len(runs) == 2 * 2 * len(positions.MODELS), "what is wrong with the page is said first"
    page.write_text("before\n<!-- positions --><!-- end of positions -->after", encoding="utf-8")
    assert positions.main([*flags, "--epochs=9", f"--write={page}"]) == 0
    assert row in (text := page.read_text(encoding="utf-8"))
    assert text.startswith("before\n<!-- positions -->")
    assert text.endswith("-->after")
    assert positions.main([*flags, "--epochs=8"]) == 2
    assert "schedule.epochs" in capsys.readouterr().err


# What a model has that not all have.
LEAVES = {
    "plain": {"pos_embed"},
    "RoPE axial": set(),
    "RoPE mixed": {"rope/freqs"},
    "4 registers, QK-norm": {"pos_embed", "reg_token", "q_norm", "k_norm"},
}


@pytest.mark.parametrize("model", positions.MODELS)
def test_the_models_differ_in_their_positions_alone(model, tmp_path):
    config = positions.recipe(model, tmp_path, seed=0, fraction=0.1, epochs=16)
    validate(config)
    plan = plan_run(config, num_train=5000, num_classes=10, num_devices=1)
    names = " ".join(trees.flat(split_model(build_model(config, plan))[1].params))
    assert {leaf for each in LEAVES.values() for leaf in each if leaf in names} == LEAVES[model]
