"""The docs build as a site without a warning, and say what is so."""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest
from PIL import Image

import deit_jax
from deit_jax.cli import main
from deit_jax.config.files import load_config, write_config
from deit_jax.training.complete import complete


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


def test_the_faq_has_messages_of_the_code(repo_root):
    """Each heading, but for what stands for names and numbers, is in one text of the package."""
    texts = set()
    for file in (repo_root / "deit_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (x.value if isinstance(x, ast.Constant) else "…" for x in node.values)
                texts.add("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
    headings = re.findall("(?m)^### `(.*)`$", (repo_root / "docs" / "faq.md").read_text())
    assert len(headings) > 20
    for heading in headings:
        pieces = [piece for piece in heading.split("…") if piece.strip()]
        found = re.compile(".*".join(map(re.escape, pieces)), re.DOTALL)
        assert any(map(found.search, texts)), heading


@pytest.mark.slow
def test_each_habit_has_a_line_that_runs(tmp_path, repo_root, monkeypatch):
    """The Python, with a small model; commands and flags are parsed, and their values checked."""
    text = (repo_root / "docs" / "habits.md").read_text()
    (tmp_path / "configs").symlink_to(repo_root / "configs")
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 50)).save("cat.jpg")
    os.makedirs("runs/mine")
    write_config(load_config("digits"), "runs/mine")
    (setup,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    space = {}
    exec(setup.replace("deit_tiny_distilled_patch16_224", "deit_testing_distilled"), space)
    deit_jax.save_model("source", space["model"])
    assert (
        main.main(["export-torch", "--src=source", "--dst=model.safetensors", "--format=timm"]) == 0
    )
    counts = {"python": 0, "command": 0}
    for line in re.findall(r"(?m)^\| .*? \| `([^`]*)`[^|]*\|$", text):
        if line.startswith(("deit-jax ", "--")):
            counts["command"] += 1
            _check_command(line)
        elif not re.search(r'"hf:|pretrained=True|deit_jax.train', line):
            counts["python"] += 1
            exec(line, space)
    assert min(counts.values()) > 15
    assert space["distillation_logits"].shape == (2, 7)


@pytest.mark.slow
def test_the_page_on_features_runs_with_the_demos_model(tmp_path, repo_root, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 50)).save(name)
    name = load_config("digits_distill").model.name
    deit_jax.save_model("runs/digits/model", deit_jax.create_model(name, num_classes=10))
    text = (repo_root / "docs" / "features.md").read_text()
    first, last = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    space = {}
    exec(first, space)
    space = {name: space[name] for name in ("model", "images")}  # imports are its own
    exec(last, space)
    assert space["tangent"].shape == (2, 64)


def _check_command(line):
    if line.startswith("--"):
        recipe = "" if "--config=" in line else "--config=deit_b"
        line = f"deit-jax train --workdir=new {recipe} {line}"
    _, command, *flags = shlex.split(line)
    module = importlib.import_module(f"deit_jax.cli.{main.COMMANDS[command][0]}")
    arguments = main._parse(command, module, flags, "deit-jax")
    if module.RECIPE and arguments.config is not None:  # report reads --data, too
        complete(arguments.config)
