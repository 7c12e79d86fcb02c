"""The figures of the models: as the models are, as published, as timm names them, as in docs."""

import pytest

from deit_jax.models import figures, registry
from experiments import model_table
from tests.oracles import timm_models

# GMACs that others counted of the PyTorch models.
PUBLISHED = {
    "cait_xxs24_224": 2.52, "cait_xxs36_384": 14.31, "cait_s24_224": 9.33, "cait_m48_448": 329.11,
    "resmlp_12_224": 3.01, "resmlp_big_24_224": 100.23, "deit3_small_patch16_18x2_224": 13.68,
    "deit3_base_patch16_18x2_224": 52.46, "regnety_160": 15.9,
}  # fmt: skip


def test_every_model_has_figures_and_no_other():
    assert sorted(figures.FIGURES) == registry.names_of()
    for name, gmacs in PUBLISHED.items():
        assert figures.FIGURES[name].gmacs == pytest.approx(gmacs, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", registry.names_of())
def test_the_figures_are_those_of_the_models(name):
    parameters, gmacs = model_table.count(name)
    assert figures.FIGURES[name].parameters == parameters
    assert figures.FIGURES[name].gmacs == pytest.approx(gmacs, abs=0.0051)


def test_the_weights_are_among_timms():
    import timm  # after the oracles have prepared torchvision

    assert timm_models.Cait
    known = set(timm.list_pretrained())
    weights = [row.weights for row in registry.list_models(details=True) if row.weights]
    assert len(weights) > 50
    assert {each.removeprefix("hf:timm/") for each in weights} <= known


@pytest.mark.parametrize(("page", "flags"), [("docs/models.md", []), ("README.md", ["--families"])])
def test_the_tables_on_the_pages_are_current(tmp_path, repo_root, page, flags):
    copy = tmp_path / "page.md"
    copy.write_bytes((repo_root / page).read_bytes())
    assert model_table.main([*flags, "--write", str(copy)]) == 0
    assert copy.read_bytes() == (repo_root / page).read_bytes()


def test_a_file_without_marks_is_named(tmp_path, capsys):
    file = tmp_path / "a.md"
    file.write_text("# Title\n")
    assert model_table.main(["--write", str(file)]) == 2
    assert "has no <!-- models -->" in capsys.readouterr().err
    assert file.read_text() == "# Title\n"
