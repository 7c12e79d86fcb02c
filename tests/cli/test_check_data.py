"""check-data names exactly what cannot be used, and counts what PIL and NumPy count."""

import json
import shutil

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from deit_jax.config.fields import default_config
from deit_jax.data.scan import Example, Unreadable, scan, survey
from deit_jax.data.transforms import eval_transform, train_transform
from tests.data.conftest import CountingSource, picture, store_tfds

FOLDER = "--config=folder"


@pytest.fixture
def run(deit_jax_command):
    """Runs the command: (status, its lines, the progress bars, the report or None)."""

    def run(*arguments):
        told = deit_jax_command("check-data", *arguments)
        found = deit_jax_command("check-data", *arguments, "--json")
        assert found.status == told.status
        report = json.loads(found.out) if found.out else None
        return told.status, told.out.splitlines(), told.err, report

    return run


BAD = ("train/a/cut.jpg", "train/a/empty.jpg", "train/b/text.jpg", "val/a/cut.png")


# Of the good files: size and mode.
GOOD = {
    "train/a/plain.jpg": (300, 400, "RGB"),
    "train/a/grey.jpg": (250, 225, "L"),
    "train/a/cmyk.jpeg": (260, 250, "CMYK"),
    "train/b/dot.jpg": (1, 1, "RGB"),
    "train/b/alpha.png": (230, 224, "RGBA"),
    "train/b/palette.PNG": (40, 900, "P"),
    "train/c/picture.bmp": (240, 240, "RGB"),
    "train/c/still.gif": (224, 500, "RGB"),
    "val/a/small.png": (20, 30, "L"),
}
COPIES = {"val/b/again.jpg": "train/a/plain.jpg", "train/c/once_more.jpg": "train/a/grey.jpg"}


@pytest.fixture
def folder(tmp_path):
    """A folder of good and bad files of many kinds."""
    for name, (height, width, mode) in GOOD.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(picture(len(name), height, width)).convert(mode)
        image.save(tmp_path / name)
    (tmp_path / "val/b").mkdir()
    for copy, name in COPIES.items():
        shutil.copy(tmp_path / name, tmp_path / copy)
    for cut, name in (
        ("train/a/cut.jpg", "train/a/plain.jpg"),
        ("val/a/cut.png", "val/a/small.png"),
    ):
        content = (tmp_path / name).read_bytes()
        (tmp_path / cut).write_bytes(content[: len(content) // 2])
    (tmp_path / "train/a/empty.jpg").touch()
    (tmp_path / "train/b/text.jpg").write_text("not a picture\n")
    return tmp_path


def _spread(values):
    least, middle, most = np.quantile(values, (0, 0.5, 1))
    return pytest.approx({"min": least, "median": middle, "max": most}, rel=1e-3)


def test_bad_files_are_named_and_the_others_counted(run, folder):
    status, out, err, report = run(FOLDER, f"--config.dataset.root={folder}")
    assert status == 1
    assert "Traceback" not in err
    assert "12/12" in err, "there is a progress bar"
    named = [line.partition(": ") for line in out if line.startswith(str(folder))]
    assert [name for name, _, _ in named] == [str(folder / name) for name in BAD]
    assert all(10 < len(reason) < 120 for _, _, reason in named), [r for _, _, r in named]
    assert out[-1].startswith("4 of 15 images cannot be used; ")

    assert not report["ok"]
    problems = [p for split in report["splits"].values() for p in split["problems"]]
    assert [p["name"] for p in problems] == [name for name, _, _ in named]
    train, val = report["splits"]["train"], report["splits"]["eval"]
    for found, part in ((train, "train"), (val, "val")):
        names = [COPIES.get(name, name) for name in (*GOOD, *COPIES) if name.startswith(part)]
        heights, widths = np.transpose([GOOD[name][:2] for name in names])
        assert found["images"] == len(names) + len(found["problems"])
        assert found["classes"] == ["a", "b", "c"]
        assert found["height"] == _spread(heights)
        assert found["width"] == _spread(widths)
        assert found["aspect"] == _spread(widths / heights)
        assert found["smaller"] == (np.minimum(heights, widths) < 224).sum()
    assert train["colours"] == {"grey": 2, "RGB": 2, "CMYK": 1, "alpha": 1, "palette": 1}
    assert val["colours"] == {"grey": 1, "RGB": 1}
    assert train["images_per_class"] == _spread([3, 3, 3])
    assert val["images_per_class"] == _spread([1, 1, 0])
    assert (train["empty_classes"], val["empty_classes"]) == ([], ["c"])
    assert "  warning: 1 of 3 classes without usable images: c" in out
    assert (train["repeated"], val["repeated"]) == (1, 0)
    again = {"train": f"{folder}/train/a/plain.jpg", "eval": f"{folder}/val/b/again.jpg"}
    assert report["in_both"] == [again]
    (warning,) = [line for line in out if line.startswith("warning: ")]
    assert warning.endswith(f", 1: {again['eval']} = {again['train']}")


@pytest.mark.parametrize("train_crop", ["random_resized", "simple_random", "small"])
def test_a_picture_that_is_nearly_a_line_is_named_where_the_run_would_refuse_it(
    run, tmp_path, train_crop
):
    config = default_config().input
    config.train_crop = train_crop
    views = train_transform(config, image_size=224)
    transforms = {
        "train": lambda data: views(data, tf.zeros((1, 2), tf.int64)),
        "val": eval_transform(config, image_size=224),
    }
    refused = []
    for split, transform in transforms.items():
        line, plain = (tmp_path / split / name / "it.png" for name in ("line", "plain"))
        for file, size in ((line, (4000, 1)), (plain, (30, 20))):
            file.parent.mkdir(parents=True)
            Image.new("RGB", size).save(file)
        try:
            tf.function(transform, autograph=False)(tf.constant(line.read_bytes()))
        except tf.errors.OpError:
            refused.append(str(line))
    flags = (f"--config.dataset.root={tmp_path}", f"--config.input.train_crop={train_crop}")
    status, _, _, report = run(FOLDER, *flags)
    problems = [p for split in report["splits"].values() for p in split["problems"]]
    assert [problem["name"] for problem in problems] == refused
    assert all("4,000×1 pixels, which would be resized" in p["reason"] for p in problems)
    assert len(refused) == {"random_resized": 1, "simple_random": 2, "small": 0}[train_crop]
    assert status == bool(refused)


def test_every_image_of_the_digits_can_be_used(run):
    status, out, _, report = run("--config=digits", "--workers=1")
    assert (status, report["ok"], report["in_both"]) == (0, True, [])
    assert "  10 classes: 0, 1, 2 … 7, 8, 9" in out
    assert out[-1].startswith("every image can be used; ")
    train = report["splits"]["train"]
    assert (train["images"], train["smaller"], train["colours"]) == (1438, 1438, {})


@pytest.mark.parametrize("kind", ["tfrecord", pytest.param("array_record", marks=pytest.mark.slow)])
def test_tfds(run, tmp_path, kind):
    files = [tmp_path / f"{number}.jpg" for number in range(5)]
    for number, file in enumerate(files):
        Image.fromarray(picture(number, 20 + number, 30)).save(file)
    files[3].write_bytes(files[3].read_bytes()[:300])
    store_tfds(tmp_path / "data", kind, files)
    flags = [f"--config.dataset.{name}" for name in ("source=tfds", "name=toy", "eval_split=test")]
    status, out, _, report = run(FOLDER, *flags, f"--config.dataset.root={tmp_path / 'data'}")
    assert status == 1
    (problem,) = report["splits"]["train"]["problems"]
    assert f"{problem['name']}: {problem['reason']}" in out
    assert report["splits"]["eval"]["problems"] == []
    assert len(report["in_both"]) == 2
    assert {pair["train"] for pair in report["in_both"]} <= {f"train:{i}" for i in range(5)}
    assert all(pair["train"] != problem["name"] for pair in report["in_both"])


def test_labels_outside_the_classes_are_problems():
    source, seen = CountingSource(9, num_classes=6), []
    report, table = survey(source, image_size=4, short=None, workers=2, seen=seen.append)
    reason = "label {} is outside the classes 0..5"
    wanted = [{"name": f"counting:{i}", "reason": reason.format(i)} for i in (6, 7, 8)]
    assert report["problems"] == wanted
    assert seen == [None] * 6 + wanted
    assert table["index"].tolist() == list(range(6))


class _Moody(CountingSource):
    """Example 3 fails at the first attempt, example 150 at every one, with errors of Python."""

    failures = {3: 1, 150: 99}  # noqa: RUF012

    def fetch(self, index):
        def check(index):
            self.failures[int(index)] = left = self.failures.get(int(index), 0) - 1
            if left >= 0:
                raise OSError("gone\naway")
            return np.int64(index)

        checked = tf.numpy_function(check, [index], tf.int64)
        return super().fetch(tf.ensure_shape(checked, ()))


def test_every_example_is_seen_once_in_order_whatever_fails():
    found = list(scan(_Moody(151), short=None, workers=4))
    assert [one.index for one in found] == list(range(151))
    assert [one.index for one in found if isinstance(one, Unreadable)] == [3, 150]
    assert "at first, but later" in found[3].reason
    assert "gone away" in found[150].reason
    assert found[7][:5] == Example(7, 7, 4, 4, "", 0)[:5]
    assert len({one.fingerprint for one in found if isinstance(one, Example)}) == 149
