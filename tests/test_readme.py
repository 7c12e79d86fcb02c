"""The README's Python lines run as they are printed."""

import dataclasses
import pkgutil
import re

import numpy as np
from flax import nnx

import deit_jax


def test_notebook_lines(tmp_path, repo_root, monkeypatch, capsys):
    """Loading, preprocessing and predicting; plain Orbax reads the same arrays."""
    model = deit_jax.create_model("deit_testing_distilled", num_classes=10, rngs=nnx.Rngs(0))
    names = tuple("0123456789")
    model.info = dataclasses.replace(model.info, class_names=names)
    deit_jax.save_model(tmp_path / "runs/digits/model", model)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (repo_root / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    space = {}
    for block in blocks:
        exec(block, space)
    assert capsys.readouterr().out.strip() in names
    assert space["logits"].shape == (1, 10)
    kernel = space["weights"]["params"]["blocks"]["0"]["attn"]["qkv"]["kernel"]
    np.testing.assert_array_equal(kernel, model.blocks[0].attn.qkv.kernel[...])


def test_public_names_are_no_modules():
    """Importing every module of the package must not put one in the place of a public name."""
    for module in pkgutil.iter_modules(deit_jax.__path__):
        assert module.name not in deit_jax.__all__
    for name in deit_jax.__all__:
        assert callable(getattr(deit_jax, name)), name
        assert callable(getattr(deit_jax, name)), f"{name}, on second use"
