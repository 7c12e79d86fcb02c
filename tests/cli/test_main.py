"""The command deit-jax: help, spelling, mistakes, exit statuses, --json and the launchers."""

import errno
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import deit_jax
from deit_jax.checkpoints import fit
from deit_jax.cli import convert, export_torch
from deit_jax.cli.arguments import Parser
from deit_jax.cli.main import COMMANDS
from deit_jax.cli.status import exit_status
from deit_jax.convert import to_torch
from deit_jax.errors import InputError, NonFiniteLoss, Preempted, TransientError
from deit_jax.models import registry
from deit_jax.planning import topology
from tests import small_main

NO_RECIPE = ("predict", "convert", "export", "export-torch", "list-models", "plot", "attention")
NO_RECIPE += ("push",)

# Neither help nor a mistake in a flag waits for the libraries.
LIGHT = """
import sys
from deit_jax.cli.main import COMMANDS, main
assert main([]) == 0
for name in COMMANDS:
    print("##")
    assert main([name, "--help"]) == 0
    assert main([name, "--jsno"]) == 2
assert main(["train", "--config=digits", "--workdir=x", "--config.train.sed=1"]) == 2
assert set(sys.modules).isdisjoint({"jax", "flax", "orbax", "tensorflow"}), "slow"
"""


def test_help_and_mistakes_are_quick(run_python):
    done = run_python("-c", LIGHT)
    assert done.returncode == 0, done.stderr
    listed, *helps = done.stdout.split("##\n")
    for (name, (_, line)), text in zip(COMMANDS.items(), helps, strict=True):
        assert f"  {name}" in listed
        assert line in listed
        example = "train" if name in ("eval", "plan") else name
        assert f"examples:\ndeit-jax {example}" in text
        assert "--json" in text
        assert ("--config.GROUP.FIELD=VALUE" in text) == (name not in NO_RECIPE)
        assert ("\n  digits_distill            A tiny DeiT" in text) == (name not in NO_RECIPE)
    assert done.stderr.count("unknown flag --jsno, did you mean --json?") == len(COMMANDS)


@pytest.mark.parametrize("by_mode", [False, True])
def test_nothing_asked_is_answered_with_an_example(deit_jax_command, by_mode):
    status, out, err = deit_jax_command(*([] if by_mode else ["train"]), by_mode=by_mode)
    assert (status, out) == (2, "")
    assert "\ndeit-jax train --config=digits_distill --workdir=runs/digits\n" in err
    assert "\n  deit3_21k                 DeiT III on ImageNet-21k" in err
    assert err.splitlines()[-1].startswith("error: the following arguments are required: --workdir")


def test_a_dash_is_an_underscore():
    parser = Parser("Summary.\n\nexample\n\nnotes")
    parser.add_argument("--image_size")
    parser.add_argument("--drop-path")
    parser.add_argument("rest", nargs="*")
    for flags in ("--image-size=5 --drop_path 1-2", "--image_size 5 --drop-path=1-2"):
        found = parser.parse_args([*flags.split(), "a-b", "--", "--image-size"])
        assert (found.image_size, found.drop_path) == ("5", "1-2")
        assert found.rest == ["a-b", "--image-size"]


def test_version(deit_jax_command):
    assert deit_jax_command("--version") == (0, f"deit-jax {deit_jax.__version__}\n", "")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("predcit b.jpg", "unknown command 'predcit', did you mean predict?"),
        ("show_batch --out x.png", "did you mean show-batch?"),
        ("eval --workdri=x", "--workdri, did you mean --workdir?"),
        ("plan --config=digits --workdir=x stray", "'stray'"),
        ("train --config=digits --workdir=x --lr=1", "--lr, did you mean --config.optimizer.lr?"),
        ("train --config=digits --workdir=x --wd 1", "--config.optimizer.weight_decay?"),
        ("train --config=digits --workdir=x --model=x", "did you mean --config.model.name?"),
        ("train --config=digits --workdir=x --epoch=3", "did you mean --config.schedule.epochs?"),
        ("eval --workdir=x --batch-size=3", "did you mean --config.train.batch_size?"),
        ("report --model m --out x.html --batchsize=3", "--batchsize, did you mean --batch_size?"),
        ("predict --model m b.jpg --lr=3", "unknown flag --lr; see"),
        ("predict --model m b.jpg gone.jpg", "gone.jpg: no such image"),
        ("predict --model m b.jpg empty", "empty holds no image"),
        ("predict --model m b.jpg --topk 0", "--topk: 0"),
        ("predict --model m b.jpg --csv gone/x.csv", "--csv: gone/x.csv"),
        ("check-data", "--config is missing"),
        ("show-batch --config=digits --out x.jpg", ".png"),
        ("show-batch --config=digits --out nowhere/x.png", "--out: nowhere/x.png"),
        ("show-batch --config=digits --out x.png b.jpg", "'b.jpg' without --randaugment"),
        ("show-batch --config=digits --out x.png --step=1320", "--step is 1320"),
        ("show-batch --config=digits --out x.png --config.train.batch_size=2000", "1438 images"),
        ("show-batch --out x.png --randaugment rand-m9", "--config or an IMAGE is missing"),
        ("show-batch --config=digits --out x.png --randaugment rand-q9", "'q9'"),
        ("show-batch --config=digits --out x.png --randaugment rand-m9 --step=1", "--step"),
        ("show-batch --out x.png --randaugment rand-m9 no.jpg", "no.jpg: no such image"),
        ("compile-for --config=digits --topology v5e:2x2 --train-images=0", "--train_images: 0"),
        ("list-models 'bert*'", "no model matches 'bert*'; deit-jax"),
        ("list-models deit_tiny", "'deit_tiny', but some match '*deit_tiny*'; deit-jax"),
    ],
)
def test_a_mistake_is_one_line(deit_jax_command, line, words):
    Image.new("RGB", (9, 9)).save("b.jpg")
    Path("empty").mkdir()
    status, out, err = deit_jax_command(*shlex.split(line))
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1
    assert sorted(p.name for p in Path().iterdir()) == ["b.jpg", "empty"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("predict --model m --csv b.png c.png", "--csv is"),  # --csv *.png: its value is forgotten
        ("predict --model m c --csv c", "would overwrite the input c;"),
        ("predict --model c b.png --csv c", "would overwrite the input c;"),
        ("show-batch --randaugment rand-m9 c.png --out c.png", "would overwrite the input c.png"),
        ("attention --model m b.png c.png --out link.png", "would overwrite the input c.png"),
    ],
)
def test_no_input_is_overwritten(deit_jax_command, line, words):
    for name in ("b.png", "c.png", "c"):
        Image.new("RGB", (9, 9)).save(name, "PNG")
    Path("link.png").symlink_to("c.png")
    before = Path("c.png").read_bytes()
    status, _, err = deit_jax_command(*shlex.split(line))
    assert (status, err.count("\n")) == (2, 1)
    assert words in err
    assert {Path(name).read_bytes() for name in ("b.png", "c.png", "c")} == {before}


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("a\nb \x1b"), 2, "error: a b \\x1b\n"),
        (TransientError("later"), 1, "error: later\n"),
        (NonFiniteLoss("nan"), 2, "error: nan\n"),
        (Preempted("saved"), 75, "deit-jax: saved\n"),
        (OSError(errno.ENOSPC, "No space"), 2, "error: [Errno 28] No space\n"),
        (MemoryError(), 2, "error: MemoryError\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (SystemExit(3), 3, ""),
        (ValueError("a bug"), None, ""),
        (OSError("no number"), None, ""),
    ],
)
def test_exit_statuses(capsys, error, status, line):
    def command():
        raise error

    if status is None:
        with pytest.raises(type(error)):
            exit_status(command)
    else:
        assert exit_status(command) == status
    out, err = capsys.readouterr()
    assert (out if status == 75 else err) == line


@pytest.mark.parametrize(
    ("command", "flag", "choices"),
    [(convert, "--pos_embed", fit.KERNELS), (export_torch, "--format", to_torch.FORMATS)],
)
def test_choices_are_those_of_the_package(command, flag, choices):
    """The commands know them without importing it."""
    parser = Parser(command.__doc__)
    command.add_arguments(parser)
    assert parser._option_string_actions[flag].choices == choices


@pytest.mark.slow
def test_json_of_every_command(deit_jax_command, monkeypatch):
    """Alone on stdout, of a run that begins here and needs no --config then."""
    monkeypatch.setattr(registry, "_MODELS", small_main.models())

    def run(line):
        status, out, err = deit_jax_command(*line.split(), "--json")
        assert status == 0, err
        assert out.count("\n") == 1
        return json.loads(out)

    short = "--config.schedule.epochs=1 --config.train.batch_size=512 --config.mixing.group_size=8"
    trained = run(f"train --config=digits --workdir=run {short}")
    assert trained["num_examples"] == 359
    assert run("eval --workdir=run") == trained
    assert deit_jax_command("--workdir=run", "--mode=eval", "--json", by_mode=True).status == 0
    plan = run("plan --workdir run")
    assert (plan["model"], plan["batch"]) == ("deit_testing", 512)
    exported = run("export-torch --src run --dst a.safetensors --format timm")
    assert exported["num_classes"] == 10
    converted = run("convert --src a.safetensors --dst model")
    assert converted["name"] == "deit_testing"
    Image.new("RGB", (8, 8)).save("b.png")
    predicted = run("predict --model model b.png")
    assert predicted["file"] == "b.png"
    shown = run("show-batch --config=run/config.json --out batch.png --count=4")
    assert Image.open("batch.png").size == (shown["width"], shown["height"])
    assert run("check-data --config=run/config.json")["ok"]


def test_json_of_compile_for(deit_jax_command, monkeypatch):
    """Without the TPU compiler; tests/planning has it."""
    monkeypatch.setattr(topology, "forecast_slice", lambda *given, **_: {"topology": given[1]})
    monkeypatch.setattr(topology, "lines", lambda *_: ["## Title"])
    ended = deit_jax_command("compile-for", "--config=digits", "--topology=v5e:2x2", "--json")
    assert (json.loads(ended.out), ended.err) == ({"topology": "v5e:2x2"}, "## Title\n")


def test_list_models(deit_jax_command):
    _, out, _ = deit_jax_command("list-models", "deit*tiny*", "--json")
    rows = {row["name"]: (row["parameters"], row["image_size"]) for row in json.loads(out)}
    assert list(rows) == registry.list_models("deit*tiny*")
    assert rows["deit_tiny_patch16_224"] == (5_717_416, 224)
    text = deit_jax_command("list-models", "deit_tiny_p*").out
    assert text.splitlines()[0] == "DeiT"
    assert text.split()[1:] == [
        *("deit_tiny_patch16_224", "5,717,416", "parameters", "224×224", "1.25", "GMACs"),
        *("top-1", "72.2", "hf:timm/deit_tiny_patch16_224.fb_in1k"),
    ]
    assert "testing" not in deit_jax_command("list-models").out
    assert "cait_testing" in deit_jax_command("list-models", "*testing*").out


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("main.py", "deit-jax train"),
        ("tools/torch_to_jax.py", "deit-jax convert"),
        ("tools/jax_to_torch.py", "deit-jax export-torch"),
        ("tools/predict.py", "deit-jax predict"),
        ("tools/data_check.py", "deit-jax check-data"),
        ("tools/show_batch.py", "deit-jax show-batch"),
        ("tools/compile_for.py", "deit-jax compile-for"),
        ("tools/benchmark.py", "input"),
    ],
)
def test_launchers_in_another_working_folder(repo_root, tmp_path, script, words):
    command = [sys.executable, str(repo_root / script), "--help"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout
