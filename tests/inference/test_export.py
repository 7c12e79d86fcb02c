"""Exported programs against their models; also in a process that has no deit-jax."""

import dataclasses
import json
import re
import subprocess
import sys
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from safetensors.numpy import load_file

import deit_jax
from deit_jax import trees
from deit_jax.cli.main import main
from deit_jax.inference.export import PLATFORMS, export_model
from deit_jax.models.network import split_model

NAMES = ("deit_testing_distilled", "parallel_testing", "hmlp_testing", "cait_testing")
NAMES += ("resmlp_testing", "vit5_testing", "vit_testing_rope_mixed_ape", "regnety_testing")


def alone(text):
    """Python after which only what the first `pip install` of a text brings can be imported."""
    wanted, installed = re.search("`pip install ([a-z ]+)`", text)[1].split(), {"pip"}
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name not in installed:
            installed.add(name)
            needs = map(Requirement, metadata.requires(name) or ())
            wanted += [n.name for n in needs if not n.marker or n.marker.evaluate({"extra": ""})]
    absent = {"deit_jax"}
    for module, sources in metadata.packages_distributions().items():
        if installed.isdisjoint(map(canonicalize_name, sources)):
            absent.add(module)
    return f"import sys\nfor name in {absent}:\n    sys.modules.setdefault(name, None)\n"


def full_effect(name, **options):
    """A model whose tensors all count, and whose preprocessing is its own."""
    options |= {} if name == "regnety_testing" else {"depth": 2}
    model = deit_jax.create_model(name, num_classes=10, **options)
    rng = np.random.default_rng(0)

    def noisy(path, leaf):
        changed = leaf + 0.1 * rng.normal(size=leaf.shape)
        return jnp.asarray(np.abs(changed) if "var" in str(path) else changed, jnp.float32)

    nnx.update(model, jax.tree_util.tree_map_with_path(noisy, nnx.state(model)))
    own = {"mean": (0.3, 0.4, 0.5), "std": (0.2, 0.3, 0.4), "class_names": tuple("abcdefghij")}
    model.info = dataclasses.replace(model.info, **own)
    return model


def logits_of(model, images):
    """By preprocess, which the program must repeat."""
    info = dataclasses.replace(model.info, crop_ratio=None)
    return list(map(np.asarray, jax.jit(model.heads)(deit_jax.preprocess(info, images))))


def pixels(count):
    return np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)


def assert_outputs(got, heads, model, images):
    """A program's outputs are the model's logits of each head, and the softmax of their mean."""
    want = logits_of(model, images)
    for head, logits in zip(heads, want, strict=True):
        assert np.abs(logits).max() > 0.1
        assert np.abs(got[head] - logits).max() <= 1e-5 * np.abs(logits).max()
    mean = np.float64(sum(want) / len(want))
    exponents = np.exp(mean - mean.max())
    likely = exponents / exponents.sum(1, keepdims=True)
    np.testing.assert_allclose(got["probabilities"], likely, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_programs_compute_what_their_models_do(name, tmp_path):
    model = full_effect(name)
    heads = ["logits_class"] + ["logits_distillation"] * ("distilled" in name)
    outputs = export_model(tmp_path, model, features=True)
    assert outputs == sorted(["features", *heads, "probabilities"])
    program = export.deserialize(bytearray((tmp_path / "program.stablehlo").read_bytes()))
    assert program.platforms == PLATFORMS
    weights = load_file(tmp_path / "weights.safetensors")
    _, variables = split_model(model)
    own = trees.flat({"params": variables.params}) | trees.flat(
        {"batch_stats": variables.batch_stats}
    )
    assert weights.keys() == own.keys()
    for key, x in own.items():
        np.testing.assert_array_equal(weights[key], x, err_msg=key)
    for count in (1, 3, 32) if "distilled" in name else (3,):
        got = program.call(weights, pixels(count))
        assert_outputs(got, heads, model, pixels(count))
    last = "head/fc/kernel" if "regnety" in name else "head/kernel"
    changed = {key: x * 1.5 if key.endswith(last) else x for key, x in weights.items()}
    other = program.call(changed, pixels(count))["logits_class"]  # the weights are no constants
    assert np.abs(other - got["logits_class"]).max() > 1e-3


@pytest.mark.parametrize("attention", ["pallas", "cudnn"])
def test_a_program_has_no_kernels_of_one_device(attention, tmp_path):
    """Its model may: built to train on a TPU or a GPU."""
    for chosen in (attention, "auto"):
        model = full_effect("deit_testing", attention=chosen, dtype=jnp.bfloat16)
        export_model(tmp_path / chosen, model)
    programs = [
        export.deserialize(bytearray((tmp_path / chosen / "program.stablehlo").read_bytes()))
        for chosen in (attention, "auto")
    ]
    calls = set(re.findall(r"custom_call @(\w+)", programs[0].mlir_module()))
    assert calls == {"shape_assertion"}  # of the number of images
    weights = load_file(tmp_path / "auto" / "weights.safetensors")
    ours, plain = (p.call(weights, pixels(3))["logits_class"] for p in programs)
    np.testing.assert_array_equal(ours, plain)


@pytest.mark.slow
def test_the_lines_of_the_docs_run_without_deit_jax(tmp_path, repo_root, capsys):
    model = full_effect("deit_testing_distilled")
    deit_jax.save_model(tmp_path / "runs" / "digits" / "model", model)
    flags = ["--model", f"{tmp_path}/runs/digits", "--out", f"{tmp_path}/digits"]
    assert main(["export", *flags, "--dtype", "float32"]) == 0
    assert "for cpu, cuda, tpu; logits_class, logits_dist" in capsys.readouterr().out
    assert main(["export", *flags]) == 2  # nothing is replaced
    assert capsys.readouterr().err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "digits"}
    Image.fromarray(pixels(1)[0]).save(tmp_path / "digit.png")
    page = (repo_root / "docs/export.md").read_text()
    lines, _ = re.findall(r"```python\n(.*?)```", page, re.S)
    command = [sys.executable, "-c", alone(page) + lines]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{'abcdefghij'[sum(logits_of(model, pixels(1)))[0].argmax()]}\n"
    about = json.loads((tmp_path / "digits" / "about.json").read_text())
    assert about["mean"] == [0.3, 0.4, 0.5]


def test_what_cannot_be_exported(tmp_path, capsys):
    deit_jax.save_model(tmp_path / "model", deit_jax.create_model("deit_testing", num_classes=0))
    for flags, words in (
        ([], "has no classes: export its features (--features)"),
        (["--platforms", "gpu"], "invalid choice: 'gpu'"),
        (["--model", f"{tmp_path}/none"], "no such file"),
    ):
        command = ["export", "--model", f"{tmp_path}/model", "--out", f"{tmp_path}/out", *flags]
        assert main(command) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
