"""Runs, models, weights and data in a bucket: a real server of its protocol on this machine."""

import functools
import json
import signal
import time

import numpy as np
import pytest
from flax import nnx
from PIL import Image

import deit_jax
from deit_jax import storage
from deit_jax.cli.main import main
from deit_jax.config.fields import default_config
from deit_jax.data import eval_batches, open_source
from deit_jax.errors import InputError
from deit_jax.models import registry
from tests import bucket, kill_and_resume, several, small_main
from tests.data.conftest import picture, plan_of, store_tfds

pytestmark = pytest.mark.slow

RUN = [
    "--config=configs/digits.py",
    "--config.dataset.train_fraction=0.125",
    "--config.train.batch_size=16",
    "--config.train.eval_every_epochs=1",
    "--config.train.log_every_steps=3",
    "--config.schedule.epochs=2",
    "--config.schedule.warmup_epochs=1",
    "--config.checkpoint.every_steps=2",
    "--config.checkpoint.keep=20",
    "--config.mixing.random_erasing=0.25",
    "--config.model.drop_path_rate=0.1",
]


@pytest.fixture(scope="module", autouse=True)
def root():
    with bucket.in_this_process():
        yield storage.path_of(f"gs://{bucket.NAME}")


def _struck_while_saving(workdir, flags, number):
    """Starts the run and sends the signal while a checkpoint, not the first, is being uploaded."""
    flags = [*flags, f"--workdir={workdir}"]
    with several.started(flags, processes=1, script=small_main.SCRIPT) as (process,):
        process.wait_for(" · epoch ")
        while process.running and not (_unfinished(workdir) and len(_saves(workdir)) > 1):
            time.sleep(0.002)
        process.send(number)
        return process.wait(120), process.stdout


def _saves(workdir):
    return [path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]


def _unfinished(workdir):
    saves = _saves(workdir)
    return [path.name for path in saves if not (path / "commit_success.txt").exists()]


def test_kills_and_stops_while_saving_change_no_bit(root, tmp_path, monkeypatch):
    """The same run on a disk, left in peace, is the oracle."""
    launch = functools.partial(kill_and_resume.launch, flags=RUN, script=small_main.SCRIPT)
    launch(tmp_path)
    workdir = root / "struck"
    status, _ = _struck_while_saving(workdir, RUN, signal.SIGKILL)
    assert status == -signal.SIGKILL
    assert _unfinished(workdir)
    status, output = _struck_while_saving(workdir, RUN, signal.SIGTERM)
    assert status == 75, output
    assert "resumed at step" in output
    assert "cannot be read" not in output
    resumed, last = launch(workdir)
    assert 0 < resumed < last == 22
    assert kill_and_resume.compare(tmp_path, workdir) == []
    steps = [line["step"] for line in kill_and_resume.metrics(workdir)]
    assert steps == [3, 6, 9, 11, 12, 15, 18, 21, 22, 22, 22]

    monkeypatch.setattr(registry, "_MODELS", small_main.models())
    config = deit_jax.load_config(workdir)
    report = deit_jax.evaluate(config, str(workdir))
    assert report == {name: kill_and_resume.final_report(tmp_path)[name] for name in report}
    ours, theirs = (deit_jax.load_model(f"{folder}/model") for folder in (workdir, tmp_path))
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    np.testing.assert_array_equal(ours(images), theirs(images))


@pytest.mark.multihost
def test_two_processes_share_a_bucket(root, tmp_path):
    flags = several.image_recipe(tmp_path / "data", num_eval=7)
    flags.append("--config.checkpoint.every_steps=4")
    for workdir in (tmp_path / "run", root / "two"):
        finished = several.run(
            [*flags, f"--workdir={workdir}"], processes=2, script=small_main.SCRIPT
        )
        assert [process.returncode for process in finished] == [0, 0], finished[0].stderr
    assert kill_and_resume.compare(tmp_path / "run", root / "two") == []


def _configs(**fields):
    config = default_config()
    config.dataset.update(fields)
    config.input.update({"train_crop": "small", "on_bad_image": "error"})
    return config.dataset, config.input


def test_data_sets_are_read_from_a_bucket_as_from_a_disk(root, tmp_path):
    files = [tmp_path / "val" / "ab"[number % 2] / f"{number} ü.jpg" for number in range(5)]
    for number, path in enumerate(files):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number, 20 + number, 30)).save(path)
    store_tfds(tmp_path, "tfrecord", files)
    for file in tmp_path.rglob("*.*"):
        if file.is_file():
            storage.copy_files(file, root / "data" / file.parent.relative_to(tmp_path).as_posix())

    for name, split in (("toy", "train"), ("", "val")):
        batches = []
        for place in (tmp_path, root / "data"):
            dataset, inputs = _configs(root=str(place), name=name, eval_split=split)
            dataset.source = "tfds" if name else "folder"
            source = open_source(dataset, "eval")
            batches.append(next(eval_batches(source, plan_of(inputs, image_size=24))))
        assert batches[0]["mask"].sum() == 5
        for key in ("image", "label"):
            np.testing.assert_array_equal(batches[0][key], batches[1][key])


def test_a_missing_object_is_named(root, tmp_path):
    Image.fromarray(picture(0, 8, 8)).save(tmp_path / "x.png")
    for name in "ab":
        storage.copy_files(tmp_path / "x.png", root / "gone" / "val" / name)
    dataset, inputs = _configs(source="folder", eval_split="val", root=str(root / "gone"))
    source = open_source(dataset, "eval")
    (root / "gone" / "val" / "b" / "x.png").unlink()
    with pytest.raises(InputError, match=r"gone/val/b/x.png.*No such file"):
        list(eval_batches(source, plan_of(inputs)))


def test_weights_are_converted_from_and_into_a_bucket(root, tmp_path):
    model = deit_jax.create_model("deit_testing_distilled", num_classes=3, rngs=nnx.Rngs(0))
    deit_jax.save_model(root / "ours", model)
    for form, name in (("timm", "weights.safetensors"), ("fb", "weights.pth"), ("hf", "hf")):
        flags = [f"--src={root}/ours", f"--dst={root}/torch/{name}", f"--format={form}"]
        assert main(["export-torch", *flags]) == 0
        flags = [f"--src={root}/torch/{name}", f"--dst={root}/back/{form}"]
        assert main(["convert", *flags, "--model=deit_testing_distilled"]) == 0
        images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
        back = deit_jax.load_model(root / "back" / form)
        np.testing.assert_array_equal(back(images), model(images))
        at_once = deit_jax.load_model(f"{root}/torch/{name}", model="deit_testing_distilled")
        np.testing.assert_array_equal(at_once(images), model(images))


@pytest.mark.parametrize(
    ("workdir", "message"),
    [
        ("s3://bucket/run", "s3:// is not supported"),
        ("GS://bucket/run", "GS:// is not supported"),
        ("exp[lr=3e-4]", r"cannot hold checkpoints .* name with \["),
        ("exp\\1", r"cannot hold checkpoints .* name with \\"),
        ("gs://bucket/exp[lr=3e-4]", r"cannot hold checkpoints .* name with \["),
        ("gs://bucket/run#2", r"cannot hold checkpoints .* name with #"),
        ("gs://bucket/what?", r"cannot hold checkpoints .* name with \?"),
        ("gs://bucket/a*b", r"cannot hold checkpoints .* name with \*"),
        ("", "--workdir is empty"),
        ("gs://nowhere/run", "cannot be written .*nowhere"),
    ],
)
def test_what_is_no_place_for_a_run_is_one_line(workdir, message):
    config = deit_jax.load_config("digits")
    with pytest.raises(InputError, match=message) as caught:
        deit_jax.train(config, workdir)
    assert "\n" not in str(caught.value)


def test_curves_of_a_run(root):
    line = {"step": 1, "split": "train", "loss": 2.0}
    (root / "drawn" / "metrics.jsonl").write_text(json.dumps(line))
    out = root / "drawn" / "curves.svg"
    assert main(["plot", str(root / "drawn"), f"--out={out}"]) == 0
    assert out.read_text().startswith("<?xml")
