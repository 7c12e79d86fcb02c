"""The docs build as a site without a warning, and say what is so."""

import os
import subprocess
import sys

import pytest

import deit_jax


@pytest.mark.slow
def test_the_site_builds(tmp_path, repo_root):
    """Strictly: every link, heading and docstring is sound; all public names are on its page."""
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-d",
        tmp_path,
    ]  # --quiet would pass warnings
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(repo_root)}
    done = subprocess.run(command, cwd=repo_root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    page = (tmp_path / "api.html").read_text()
    for name, home in deit_jax._HOME.items():
        assert f'id="{home}.{name}"' in page
    assert 'href="deit_jax/config/fields.py.html"' in (tmp_path / "index.html").read_text()
