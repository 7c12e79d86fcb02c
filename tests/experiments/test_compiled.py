"""The tables of compiled steps: the pages show the rows that are kept, and nothing else."""

import shutil

import pytest

from deit_jax.errors import InputError
from deit_jax.planning.markdown import write_between
from experiments import compiled


@pytest.mark.parametrize("kind", ["tpu", "gpu", "attention"])
def test_pages_show_the_kept_rows(tmp_path, monkeypatch, kind):
    docs = shutil.copytree(compiled._DOCS, tmp_path / "docs")
    page, section, _ = compiled._SECTIONS[kind]
    before = (docs / page).read_text(encoding="utf-8")
    write_between(docs / page, section, [])

    def compile_nothing(command):
        raise InputError(f"{command} is not kept")

    monkeypatch.setattr(compiled, "_compiled", compile_nothing)
    monkeypatch.setattr(compiled, "_DOCS", docs)
    compiled.main([kind])
    assert (docs / page).read_text(encoding="utf-8") == before


def test_what_attention_takes_of_a_block():
    """Both ways of a cell: its share of the step, for each of two blocks and four images."""
    report = {"model": "deit_small_patch16_224", "image_size": 64, "batch": 8, "devices": 2}
    report |= {"date": "2026-11-29", "versions": {"jax": "0.12"}}
    rows = [
        report | {"command": f"... --config.model.attention={way}", "seconds": seconds}
        | {"parts": {"attention": share, "MLP": 1 - share}}
        for way, seconds, share in (("xla", 1e-3, 0.6), ("pallas", 8e-4, 0.5))
    ]  # fmt: skip
    table = list(compiled.attention_lines(rows))
    assert table[0] == "| model | pixels | images a chip | xla | pallas | xla / pallas |"
    assert table[2:] == [
        "| deit_small_patch16 | 64 | 4 | 75.0 | 50.0 | 1.50 |",
        "",
        "2026-11-29; jax 0.12.",
    ]
    assert len(list(compiled.attention_lines(rows[:1]))) == 4, "a cell half done is not shown"


def test_the_kernels_pay_wherever_they_were_compiled():
    kept = compiled._kept(compiled._DOCS / "results" / "compiled_attention.jsonl")
    wanted = [compiled._command(*cell) for cell in compiled._cells("attention")]
    assert sorted(kept) == sorted(wanted)
    rows = [line for line in compiled.attention_lines(list(kept.values())) if "| deit" in line]
    assert len(rows) == len(wanted) / 2
    assert min(float(row.split("|")[-2]) for row in rows) > 1
