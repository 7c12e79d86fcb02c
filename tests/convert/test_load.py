"""One line to a model: from folders, files, URLs and the hub, whose protocol a server speaks."""

import functools
import hashlib
import json
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from timm.models import get_pretrained_cfg

import deit_jax
from deit_jax.models import figures, registry
from tests import several
from tests.convert.conftest import numpy_state, save, timm_twin
from tests.convert.loopback import SHA
from tests.refusal import refusal

NAME = "deit_testing_distilled"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DEIT_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def logits_of(module, images):
    with torch.no_grad():
        return module.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


def assert_logits(model, module, images, tolerance=2e-5):
    want = logits_of(module, images)
    assert np.abs(model(images) - want).max() <= tolerance * np.abs(want).max()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_files_folders_and_runs(tmp_path, images, suffix, capsys):
    module = timm_twin(NAME)
    file = save(tmp_path / f"weights{suffix}", numpy_state(module))
    model = deit_jax.load_model(file)
    assert_logits(model, module, images)
    assert f"{file}: {NAME}, timm names" in capsys.readouterr().err
    deit_jax.save_model(tmp_path / "run" / "model", model)
    for folder in (tmp_path / "run", str(tmp_path / "run" / "model")):
        again = deit_jax.load_model(folder, dtype=jnp.bfloat16)
        assert again.info == model.info
        assert_logits(again, module, images, 0.05)
        with pytest.raises(AssertionError):
            assert_logits(again, module, images)
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_weights_are_fitted_as_the_tool_does(tmp_path, capsys):
    file = save(tmp_path / "weights.safetensors", numpy_state(timm_twin(NAME)))
    command = ["convert", "--src", file, "--dst", tmp_path / "model"]
    command += ["--num_classes", 3, "--image_size", 48, "--pos_embed", "timm"]
    assert deit_jax.cli.main.main([str(word) for word in command]) == 0
    told = capsys.readouterr().out
    fitted = {"num_classes": 3, "image_size": 48, "pos_embed": "timm"}
    model = deit_jax.load_model(file, **fitted)
    notes = capsys.readouterr().err.replace(f"{file}: ", "note: ").splitlines()
    assert len(notes) > 3
    assert notes[1:] == [line for line in told.splitlines() if line.startswith("note: ")]
    want = deit_jax.load_model(tmp_path / "model")
    for got, expected in zip(*map(jax.tree.leaves, map(nnx.state, (model, want))), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert model.info == want.info

    from_folder = deit_jax.load_model(tmp_path / "model", num_classes=0, drop_path_rate=0.5)
    assert "head, head_dist dropped" in capsys.readouterr().err
    zeros = np.zeros((1, 48, 48, 3), np.float32)
    np.testing.assert_array_equal(from_folder(zeros), want.features(zeros))
    assert from_folder.blocks[-1].drop_path.rate == 0.5
    heads = [deit_jax.load_model(file, num_classes=3, rngs=nnx.Rngs(s)).head for s in (0, 0, 1)]
    first, same, other = (np.asarray(head.kernel[...]) for head in heads)
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)


@pytest.mark.slow
def test_a_url_is_converted_once(hub, tmp_path, images, cache, capsys):
    modules = [timm_twin(NAME, seed=seed) for seed in (0, 1)]
    bodies = [
        save(tmp_path / f"{seed}.pth", numpy_state(module)).read_bytes()
        for seed, module in enumerate(modules)
    ]
    url = f"{hub.address}/files/weights.pth"
    hub.files["weights.pth"] = bodies[0]
    assert_logits(deit_jax.load_model(url), modules[0], images)
    digest = hashlib.sha256(bodies[0]).hexdigest()
    assert deit_jax.load_model(url).info.source == f"{url}, SHA-256 {digest} (timm names)"
    (folder,) = cache.iterdir()
    assert f"{url}: from {folder}, {url}, SHA-256 {digest}" in capsys.readouterr().err

    hub.files["weights.pth"] = bodies[1]
    assert_logits(deit_jax.load_model(url), modules[0], images)
    assert hub.seen == ["/files/weights.pth"]
    assert_logits(deit_jax.load_model(url, refresh=True), modules[1], images)
    assert_logits(deit_jax.load_model(url), modules[1], images)
    assert len(hub.seen) == 2

    shutil.rmtree(next(folder.glob("weights*")))  # damaged: made again, of what was downloaded
    capsys.readouterr()
    assert deit_jax.load_model(url).info.name == NAME
    assert "converting again" in capsys.readouterr().err
    del hub.files["weights.pth"]
    assert "404" in refusal(functools.partial(deit_jax.load_model, url, refresh=True))
    assert deit_jax.load_model(url).info.name == NAME  # what is kept stays
    assert list(cache.iterdir()) == [folder]


def test_a_cache_that_cannot_be_written_costs_no_model(hub, tmp_path, cache, capsys):
    body = save(tmp_path / "x.pth", numpy_state(timm_twin(NAME))).read_bytes()
    hub.files["x.pth"] = body
    cache.parent.mkdir()
    cache.write_text("not a folder")
    assert deit_jax.load_model(f"{hub.address}/files/x.pth").info.name == NAME
    assert "not kept, so the next start converts it again" in capsys.readouterr().err


_LOAD_ALL = """
import json, sys
import numpy as np
import deit_jax
from deit_jax.models import figures
figures.FIGURES["deit_testing"] = figures.FIGURES["deit_testing"]._replace(tag="fb_in1k")
images = np.load(sys.argv[1])
for name in sys.argv[2:]:
    try:
        if name.startswith("hf:"):
            model = deit_jax.load_model(name)
        else:
            model = deit_jax.create_model(name, pretrained=True, num_classes=None)
        print(json.dumps([model.info.source, np.asarray(model(images)).tolist()]))
    except deit_jax.InputError as error:
        print(json.dumps(["InputError", str(error)]))
"""


@pytest.mark.slow
def test_the_hub(hub, tmp_path, images, run_python):
    modules = {name: timm_twin(name) for name in (NAME, "deit_testing")}
    saved = {
        name: save(tmp_path / f"{name}.safetensors", numpy_state(module)).read_bytes()
        for name, module in modules.items()
    }
    config = json.dumps({"architecture": "deit_testing", "pretrained_cfg": {"mean": [0.5] * 3}})
    hostile = tmp_path / "evil.bin"
    torch.save({"model": functools.partial(print, "ran")}, hostile)
    np.save(tmp_path / "images.npy", images)
    repositories = {
        "owner/deit": {"model.safetensors": saved[NAME]},
        "timm/deit_testing.fb_in1k": {
            "config.json": config.encode(),
            "model.safetensors": saved["deit_testing"],
        },
        "owner/evil": {"pytorch_model.bin": hostile.read_bytes()},
    }
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
    env |= {"HF_HUB_DISABLE_XET": "1", "DEIT_JAX_CACHE": str(tmp_path / "cache")}

    def run(address, *names, **more):
        arguments = "-c", _LOAD_ALL, str(tmp_path / "images.npy"), *names
        ran = run_python(*arguments, env=env | {"HF_ENDPOINT": address} | more)
        assert ran.returncode == 0, ran.stderr
        return [json.loads(line) for line in ran.stdout.splitlines()], ran.stderr

    names = ("hf:owner/deit", "deit_testing", "hf:owner/evil", "hf:owner/none")
    hub.repositories = repositories
    (deit, published, evil, none), _ = run(hub.address, *names)
    hub.honest = False
    fresh = {"HF_HOME": str(tmp_path / "hf2"), "DEIT_JAX_CACHE": str(tmp_path / "cache2")}
    ((kind, wrong),), _ = run(hub.address, "hf:owner/deit", **fresh)
    assert (kind, wrong[:15]) == ("InputError", "hf:owner/deit: ")
    assert "does not have the SHA-256 that the hub gave for it" in wrong
    assert deit[0] == f"hf:owner/deit, revision {SHA} (timm names)"
    for (_, got), name in ((deit, NAME), (published, "deit_testing")):
        want = logits_of(modules[name], images)
        assert np.abs(np.array(got) - want).max() <= 2e-5 * np.abs(want).max()
    for (kind, line), words in ((evil, "could execute code"), (none, "404")):
        assert (kind, "\n" in line) == ("InputError", False)
        assert words in line
    dead = f"http://127.0.0.1:{several.free_port()}"
    again, said = run(dead, *names[:2], HF_HOME=str(tmp_path / "nowhere"))
    assert again == [deit, published]
    assert "deit_testing: weights hf:timm/deit_testing.fb_in1k, licence apache-2.0\n" in said


def test_bad_sources_get_one_line(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pth").write_text("no weights")
    file = save(tmp_path / "weights.safetensors", numpy_state(timm_twin(NAME)))
    load, create = deit_jax.load_model, functools.partial(deit_jax.create_model, pretrained=True)
    for call, argument, options, words in (
        (load, "deit_base_patch16_224", {}, "are hf:timm/deit_base_patch16_224.fb_in1k$"),
        (load, "vit5_small_patch16_224", {}, "of which timm has no published weights"),
        (load, "facebook/deit-tiny", {}, "write hf:facebook/deit-tiny"),
        (load, tmp_path / "none.pth", {}, "no such file"),
        (load, tmp_path / "empty", {}, "is not a model folder"),
        (load, tmp_path / "text.pth", {}, "text.pth"),
        (load, "s3://bucket/model", {}, "https"),
        (load, "http://example.com/a.pth", {}, "not safe"),
        (load, "hf:nobody", {}, "expected hf:OWNER/NAME"),
        (load, file, {"depth": 3}, "weights have their depth"),
        (load, file, {"image_size": 3}, "smaller than one patch"),
        (load, file, {"num_classes": -1}, "num_classes is -1"),
        (load, file, {"class_names": ["a"]}, "1 class names for 7"),
        (load, file, {"pos_embed": "linear", "image_size": 48}, "kernel is"),
        (load, file, {"model": "deit3_testing"}, "."),
        (create, "deit_bse_patch16_224", {}, "did you mean deit_base"),
        (create, "vit5_small_patch16_224", {}, "timm has no weights of vit5_small_patch16_224"),
        (create, "deit_base_patch16_224", {"embed_dim": 8}, "weights have their embed_dim"),
    ):
        assert re.search(words, refusal(functools.partial(call, argument, **options)))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "deit-jax[hub]" in refusal(create, "deit_base_patch16_224")


def test_the_table_of_weights_is_timms(repo_root):
    for row in registry.list_models(details=True):
        if row.weights:
            config = get_pretrained_cfg(row.weights.removeprefix("hf:timm/"))
            assert config.hf_hub_id == row.weights.removeprefix("hf:")
            assert config.license == row.licence, row.name
        else:
            assert row.licence == ""
    page = (repo_root / "docs" / "weights.md").read_text()
    named = re.findall(r"`((\w+)-[0-9a-f]{8}\.pth)`", page)
    assert len(named) == 9
    for file, name in named:
        (row,) = registry.list_models(name, details=True)
        assert get_pretrained_cfg(row.weights.removeprefix("hf:timm/")).url.endswith(
            f"/deit/{file}"
        )
    assert figures.LICENCES.keys() == {tag for *_, tag in figures.FIGURES.values()}
