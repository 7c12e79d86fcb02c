"""What `deit-jax push` writes: timm and transformers load it; the hub, on loopback, takes it."""

import json
import re

import jax
import numpy as np
import pytest
import torch
import yaml

import deit_jax
from deit_jax.cli.main import main
from deit_jax.models import registry
from deit_jax.models.network import split_model
from tests.convert import loopback
from tests.convert.conftest import SMALL

NAME = "deit_testing_distilled"
REPORT = {"split": "final", "step": 120, "top1": 91.5, "top1_cls": 90.25, "top1_dist": 90.75}
REPORT |= {"loss": 0.3, "num_examples": 359, "ema_top1": 92.0, "ema_top1_cls": 91.0}


def full_effect(name, **options):
    """Our model, every tensor of which counts."""
    model = registry.create_model(name, num_classes=7, **options)
    network, variables = split_model(model)
    rng = np.random.default_rng(0)

    def noisy(path, leaf):
        changed = leaf + 0.1 * rng.standard_normal(leaf.shape)
        return np.float32(np.abs(changed) if "var" in str(path) else changed)

    variables = jax.tree_util.tree_map_with_path(noisy, variables)
    model = deit_jax.models.network.join_model(network, jax.tree.map(jax.numpy.asarray, variables))
    model.info = network.info
    return model


def a_run(folder, model, *, weights="model"):
    """A run's folder: the model, its configuration and its report."""
    deit_jax.save_model(folder / weights, model)
    config = {"dataset": {"source": "folder", "root": "/home/me/private/leaves"}, "init_from": ""}
    config |= {"train": {"batch_size": 64}, "optimizer": {"lr": 0.003}, "workdir": "/secret"}
    (folder / "config.json").write_text(json.dumps(config))
    records = [{"split": "train", "step": 120}, REPORT | {"split": "eval", "step": 60}, REPORT]
    records[1]["top1"] = 93.5
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def push(*arguments):
    return main(["push", *map(str, arguments)])


def assert_same_logits(model, module, images):
    with torch.no_grad():
        want = module.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    want = getattr(want, "logits", want).numpy()
    got = np.asarray(jax.jit(lambda m, x: m(x))(model, images))
    assert np.abs(want).max() > 0.1
    assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()


def assert_same_weights(*models):
    for got, want in zip(*(jax.tree.leaves(split_model(m)[1]) for m in models), strict=True):
        np.testing.assert_array_equal(got, want)


TIMM = {
    **{
        name: {}
        for name in SMALL
        if name not in ("hmlp_testing", "regnety_testing", "resmlp_testing")
    },
    "deit_tiny_patch16_224": {"image_size": 32, "depth": 2},
    "resmlp_12_224": {"image_size": 32},
    "regnety_002": {"image_size": 32},
    "cait_xxs24_224": {"image_size": 32, "depth": 1},
    "parallel_testing": {"layer_scale_init": None, "image_size": 48},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_timm_loads_what_the_dry_run_wrote(tmp_path, name, images):
    import timm

    model = full_effect(name, **TIMM[name])
    deit_jax.save_model(tmp_path / "model", model)
    assert push("--model", tmp_path / "model", "--dry-run", tmp_path / "out") == 0
    module = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    images = np.resize(images, (2, model.info.side, model.info.side, 3))
    assert_same_logits(model, module, images)
    said = timm.data.resolve_model_data_config(module)
    assert tuple(said["input_size"]) == (3, model.info.side, model.info.side)
    assert (tuple(said["mean"]), tuple(said["std"])) == (model.info.mean, model.info.std)
    whole = model.info.crop_ratio is None
    assert said["crop_mode"] == ("squash" if whole else "center")
    assert said["crop_pct"] == (model.info.crop_ratio or 1.0)
    timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=3)  # new heads
    again = deit_jax.load_model(tmp_path / "out")
    assert again.info == model.info
    for got, want in zip(
        *(jax.tree.leaves(split_model(m)[1]) for m in (again, model)), strict=True
    ):
        np.testing.assert_array_equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL[:2])
def test_transformers_loads_what_the_dry_run_wrote(tmp_path, name, images):
    import transformers

    model = full_effect(name)
    deit_jax.save_model(tmp_path / "model", model)
    out = tmp_path / "out"
    assert push("--model", tmp_path / "model", "--dry_run", out, "--layout", "hf") == 0
    use = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)[1]
    scope = {}
    exec(use.replace("OWNER/out", str(out)), scope)  # the lines of the card, as they stand there
    assert isinstance(scope["model"], transformers.PreTrainedModel)
    assert_same_logits(model, scope["model"], images)
    assert deit_jax.load_model(out).info == model.info


def test_the_card_says_what_the_run_says(tmp_path, capsys):
    model = full_effect(NAME)
    run = a_run(tmp_path / "run", model)
    for place, weights, shown, when in (
        ("run", "raw", ["91.5", "90.25", "90.75"], "at step 120"),
        ("run/best", "raw", ["93.5"], "at step 60"),
        ("run/model_ema", "ema", ["92", "91"], "the EMA at step 120"),
    ):
        if place != "run":
            own = model.info.to_json() | {"weights": weights}
            model.info = type(model.info).from_json(own)
            deit_jax.save_model(tmp_path / place, model)
        out = tmp_path / f"out-{place.replace('/', '-')}"
        assert push("--model", tmp_path / place, "--to", "me/leaf-1", "--dry-run", out) == 0
        assert "note: the card's licence is a placeholder" in capsys.readouterr().out
        card = (out / "README.md").read_text()
        cells = re.findall(r"^\| .*?accuracy.*?% \| (.*?) \|$", card, re.M)
        assert cells[: len(shown)] == shown
        assert f"On the evaluation images of the run, {when}:" in card
        assert 'timm.create_model("hf-hub:me/leaf-1", pretrained=True)' in card
        assert "| dataset.root | leaves |" in card
        assert "| optimizer.lr | 0.003 |" in card
        assert not any(word in card for word in ("private", "secret", "init_from"))
        front = yaml.safe_load(card.split("---")[1])
        assert front["license"] == "other"
        assert "**Licence: to be filled in.**" in card
    assert push("--model", run, "--dry-run", tmp_path / "mit", "--license", "mit") == 0
    card = (tmp_path / "mit" / "README.md").read_text()
    assert 'license: "mit"' in card
    assert "filled in" not in card


@pytest.fixture
def connected(hub, monkeypatch, tmp_path):
    """huggingface_hub, told of the server as HF_ENDPOINT would, with a token."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", loopback.TOKEN)
    return hub


@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # huggingface_hub's
def test_an_upload_replaces_nothing_unasked(tmp_path, connected, capsys, monkeypatch):
    model = full_effect(NAME)
    run, flags = a_run(tmp_path / "run", model), ("--to", "owner/leaf")
    assert push("--model", run, *flags, "--layout", "hf") == 0
    assert f"{connected.address}/owner/leaf/commit/" in capsys.readouterr().out
    held = connected.repositories["owner/leaf"]
    files = {"README.md", "config.json", "preprocessor_config.json", "model.safetensors"}
    assert set(held) == {".gitattributes", *files}
    assert len(connected.commits) == 1
    (tmp_path / "held").mkdir()
    for name, content in held.items():
        (tmp_path / "held" / name).write_bytes(content)
    again = deit_jax.load_model(tmp_path / "held")
    for got, want in zip(
        *(jax.tree.leaves(split_model(m)[1]) for m in (again, model)), strict=True
    ):
        np.testing.assert_array_equal(got, want)

    before, _ = dict(held), capsys.readouterr()
    assert push("--model", run, *flags) == 2
    line = capsys.readouterr().err
    assert "owner/leaf holds 4 files already (README.md, config.json, model.safetensors" in line
    assert line.count("\n") == 1
    assert held == before
    held["notes.txt"] = b"somebody's"
    assert push("--model", run, *flags, "--overwrite") == 0
    assert set(held) == {".gitattributes", *files, "notes.txt"} - {"preprocessor_config.json"}
    assert held["notes.txt"] == b"somebody's"
    assert json.loads(held["config.json"])["architecture"] == "deit_tiny_distilled_patch16_224"
    assert connected.commits[1][0]["value"]["parentCommit"] == loopback.SHA
    assert push("--model", run, *flags, "--overwrite", "--private") == 2
    assert "owner/leaf is public, and --private only says" in capsys.readouterr().err
    hidden = ("--model", run, "--to", "owner/hidden", "--private")
    assert push(*hidden) == push(*hidden, "--overwrite") == 0
    assert connected.private == {"owner/hidden"}
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    capsys.readouterr()
    assert push("--model", run, *flags, "--overwrite") == 2
    assert "owner/leaf: refused by the hub (" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", loopback.TOKEN)
    connected.honest = False
    assert push("--model", run, *flags, "--overwrite") == 2
    assert "owner/leaf: refused by the hub (" in capsys.readouterr().err
    assert len(connected.commits) == 4


def test_what_cannot_be_pushed(tmp_path, connected, capsys, monkeypatch):
    names = {"plain": "deit3_testing", "vit5": "vit5_testing", "hmlp": "hmlp_testing"}
    for place, name in (names | {"regnet": "regnety_testing", "resmlp": "resmlp_testing"}).items():
        deit_jax.save_model(tmp_path / place, registry.create_model(name))
    (tmp_path / "there").mkdir()
    to = ("--to", "owner/name")
    before = {path.name for path in tmp_path.iterdir()}
    for place, flags, words in (
        ("plain", (), "name the repository, --to OWNER/NAME, or a folder, --dry_run DIR"),
        ("plain", ("--to", "name"), "expected OWNER/NAME"),
        ("plain", ("--to", "a/b/c"), "expected OWNER/NAME"),
        ("plain", ("--dry_run", tmp_path / "there"), "exists; choose another path"),
        ("plain", ("--dry_run", tmp_path / "new", "--private"), "are for uploads; drop them"),
        ("plain", (*to, "--layout", "hf"), "take timm or fb"),
        ("vit5", to, "timm has RoPE-ViT without registers"),
        ("hmlp", to, "has hmlp True, which no name of timm's stands for"),
        ("resmlp", to, "timm builds ResMLP by its names alone"),
        ("regnet", to, "timm builds RegNetY by its names alone"),
        ("nothing", to, "is not a model folder"),
    ):
        assert push("--model", tmp_path / place, *flags) == 2, words
        line = capsys.readouterr().err
        assert words in line
        assert line.count("\n") == 1
    monkeypatch.delenv("HF_TOKEN")
    assert push("--model", tmp_path / "plain", *to) == 2
    assert "no token of the hub: run `hf auth login`, or set HF_TOKEN" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    assert push("--model", tmp_path / "plain", *to) == 2
    assert "pip install 'deit-jax[hub]', or write the files by --dry_run" in capsys.readouterr().err
    assert not connected.seen
    assert {path.name for path in tmp_path.iterdir()} == before
