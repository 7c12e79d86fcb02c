"""Python lines of README and docs/checkpoints.md run as printed, and links lead somewhere."""

import contextlib
import dataclasses
import pkgutil
import re

import jax
import numpy as np
import optax
from flax import nnx

import deit_jax
from deit_jax import trees
from deit_jax.checkpoints.training import TrainCheckpoints
from deit_jax.models.network import split_model
from deit_jax.training.state import new_state


def test_notebook_lines(tmp_path, repo_root, monkeypatch, capsys):
    """Loading, preprocessing and predicting; plain Orbax reads the same arrays, of training too."""
    model = deit_jax.create_model("deit_testing_distilled", num_classes=10, rngs=nnx.Rngs(0))
    names = tuple("0123456789")
    model.info = dataclasses.replace(model.info, class_names=names)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        deit_jax.save_model("runs/digits/model", model, replace=True)
    network, variables = split_model(model)
    ema = jax.tree.map(lambda x: x + 1, variables)
    state = new_state(variables, optax.adam(1e-3), ema=True).replace(ema=ema)
    with contextlib.closing(TrainCheckpoints("runs/digits", keep=1)) as checkpoints:
        checkpoints.save(state, network.info, step=1320, best={"top1": -1.0, "step": -1})
    space = {}
    for page, count in (("README.md", 1), ("docs/checkpoints.md", 2)):
        blocks = re.findall(r"```python\n(.*?)```", (repo_root / page).read_text(), re.DOTALL)
        assert len(blocks) == count
        here = {}
        for block in blocks:
            exec(block, here)
        space |= here
    assert capsys.readouterr().out.strip() in names
    assert space["logits"].shape == (1, 10)
    assert (space["features"].ndim, space["rollout"].ndim) == (2, 3)
    kernel = space["weights"]["params"]["blocks"]["0"]["attn"]["qkv"]["kernel"]
    np.testing.assert_array_equal(kernel, model.blocks[0].attn.qkv.kernel[...])
    read, kept = trees.flat(space["model_part"]["params"]), trees.flat(variables.params)
    assert read.keys() == kept.keys()
    for name, value in kept.items():
        assert isinstance(read[name], np.ndarray)
        np.testing.assert_array_equal(read[name], value, err_msg=name)


def test_links_lead_somewhere(repo_root):
    """Every file and every heading that a page names is there."""
    folders = ("", "docs/", "deit_jax/*/")
    pages = [page for folder in folders for page in repo_root.glob(f"{folder}*.md")]
    texts = {page: re.sub(r"(?ms)^```.*?^```", "", page.read_text()) for page in pages}
    for page, text in texts.items():
        for name, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), f"{page.name}: {name}"
            titles = re.findall(r"(?m)^#+ (.*)", texts[target].lower()) if heading else []
            slugs = [re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in titles]
            assert not heading or heading in slugs, f"{page.name}: {name}#{heading}"


def test_public_names_are_no_modules():
    """Importing every module of the package must not put one in the place of a public name."""
    for module in pkgutil.iter_modules(deit_jax.__path__):
        assert module.name not in deit_jax.__all__
    for name in deit_jax.__all__:
        assert callable(getattr(deit_jax, name)), name
        assert callable(getattr(deit_jax, name)), f"{name}, on second use"
