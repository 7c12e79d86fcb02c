"""The notebooks run from their first cell to the last, with public names alone."""

import os
import re
import sys
import warnings
from pathlib import Path

import nbformat
import pytest

import deit_jax

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def test_they_use_public_names_and_keep_no_output():
    assert len(NOTEBOOKS) == 3
    for notebook in NOTEBOOKS:
        for cell in nbformat.read(notebook, 4).cells:
            if cell.cell_type == "code":
                assert not cell.outputs
                assert not re.search(r"(from|import) deit_jax\.", cell.source)
                names = set(re.findall(r"\bdeit_jax\.(\w+)", cell.source))
                assert names <= set(deit_jax.__all__), names


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_run(notebook, tmp_path, repo_root, monkeypatch):
    command = tmp_path / "bin" / "deit-jax"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m deit_jax "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(repo_root))
    for name in ("JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION"):
        monkeypatch.delenv(name)  # optax's schedules promote
    (tmp_path / "here").mkdir()
    where = {"metadata": {"path": str(tmp_path / "here")}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Jupyter's own
        from nbclient import NotebookClient

        NotebookClient(nbformat.read(notebook, 4), timeout=300, resources=where).execute()
