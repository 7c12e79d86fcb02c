"""check-data names exactly what cannot be used, and counts what PIL and NumPy count."""

import json

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from deit_jax.data.scan import Example, Unreadable, scan, survey
from tests.data.conftest import CountingSource, picture, store_tfds

FOLDER, DIGITS = "--config=configs/folder.py", "--config=configs/digits.py"


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


@pytest.fixture
def folder(tmp_path):
    """A folder of good and bad files of many kinds: its root and the sizes of the good ones."""
    root, sizes = tmp_path / "images", {"train": [], "val": []}
    for kind in ("train/a", "train/b", "train/c", "val/a", "val/b"):
        (root / kind).mkdir(parents=True)

    def save(name, height, width, mode="RGB"):
        image = Image.fromarray(picture(len(name), height, width)).convert(mode)
        image.save(root / name)
        sizes[name.partition("/")[0]].append((height, width))

    save("train/a/plain.jpg", 300, 400)
    save("train/a/grey.jpg", 250, 225, "L")
    save("train/a/cmyk.jpeg", 260, 250, "CMYK")
    save("train/b/dot.jpg", 1, 1)
    save("train/b/alpha.png", 230, 224, "RGBA")
    save("train/b/palette.PNG", 40, 900, "P")
    save("train/c/picture.bmp", 240, 240)
    save("train/c/still.gif", 224, 500)
    save("val/a/small.png", 20, 30, "L")
    (root / "val/b/again.jpg").write_bytes((root / "train/a/plain.jpg").read_bytes())
    sizes["val"].append((300, 400))
    (root / "train/c/once_more.jpg").write_bytes((root / "train/a/grey.jpg").read_bytes())
    sizes["train"].append((250, 225))

    good = (root / "train/a/plain.jpg").read_bytes()
    (root / "train/a/cut.jpg").write_bytes(good[: len(good) // 2])
    (root / "train/a/empty.jpg").touch()
    (root / "train/b/text.jpg").write_text("not a picture\n")
    good = (root / "train/b/alpha.png").read_bytes()
    (root / "val/a/cut.png").write_bytes(good[: len(good) // 2])
    return root, sizes


def _spread(values):
    least, middle, most = np.quantile(values, (0, 0.5, 1))
    return pytest.approx({"min": least, "median": middle, "max": most}, rel=1e-3)


def test_bad_files_are_named_and_the_others_counted(run, folder):
    root, sizes = folder
    status, out, err, report = run(FOLDER, f"--config.dataset.root={root}")
    assert status == 1
    assert "Traceback" not in err
    assert "12/12" in err, "there is a progress bar"
    named = [line.partition(": ")[0] for line in out if line.startswith(str(root))]
    assert named == [str(root / name) for name in BAD]
    assert all(len(line.partition(": ")[2]) > 10 for line in out if line.startswith(str(root)))
    assert out[-1].startswith("4 of 15 images cannot be used; ")

    assert not report["ok"]
    problems = [p for split in report["splits"].values() for p in split["problems"]]
    assert [p["name"] for p in problems] == named
    for split, part in (("train", "train"), ("eval", "val")):
        found, (heights, widths) = report["splits"][split], np.transpose(sizes[part])
        assert found["images"] == len(heights) + len(found["problems"])
        assert found["classes"] == ["a", "b", "c"]
        assert found["height"] == _spread(heights)
        assert found["width"] == _spread(widths)
        assert found["aspect"] == _spread(widths / heights)
        assert found["smaller"] == (np.minimum(heights, widths) < 224).sum()
    train, val = report["splits"]["train"], report["splits"]["eval"]
    assert train["colours"] == {"grey": 2, "RGB": 2, "CMYK": 1, "alpha": 1, "palette": 1}
    assert val["colours"] == {"grey": 1, "RGB": 1}
    assert train["images_per_class"] == _spread([3, 3, 3])
    assert val["images_per_class"] == _spread([1, 1, 0])
    assert (train["empty_classes"], val["empty_classes"]) == ([], ["c"])
    assert "  warning: 1 of 3 classes without usable images: c" in out
    assert (train["repeated"], val["repeated"]) == (1, 0)
    again = {"train": f"{root}/train/a/plain.jpg", "eval": f"{root}/val/b/again.jpg"}
    assert report["in_both"] == [again]
    (warning,) = [line for line in out if line.startswith("warning: ")]
    assert warning.endswith(f", 1: {again['eval']} = {again['train']}")


def test_a_sound_folder(run, folder):
    root, _ = folder
    for name in (*BAD, "val/b/again.jpg"):
        (root / name).unlink()
    Image.fromarray(picture(1, 30, 30)).save(root / "val/b/other.jpg")
    status, out, _, report = run(FOLDER, f"--config.dataset.root={root}", "--workers=1")
    assert status == 0
    assert report["ok"]
    assert not report["in_both"]
    assert out[0] == f"train: folder {root}/train, 9 images"
    assert out[1] == "  3 classes: a, b, c"
    assert out[-1].startswith("every image can be used; ")


def test_digits(run):
    status, out, _, report = run(DIGITS)
    assert status == 0
    assert "  10 classes: 0, 1, 2 … 7, 8, 9" in out
    train = report["splits"]["train"]
    assert train["images"] == 1438
    assert train["height"] == train["width"] == {"min": 8, "median": 8, "max": 8}
    assert train["smaller"] == 1438
    assert train["colours"] == {}


@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
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
    number = int(problem["name"].removeprefix("train:"))
    assert f"train:{number}: {problem['reason']}" in out
    assert report["splits"]["eval"]["problems"] == []
    assert len(report["in_both"]) == 2
    assert {pair["train"] for pair in report["in_both"]} <= {f"train:{i}" for i in range(5)}
    assert all(pair["train"] != problem["name"] for pair in report["in_both"])


def test_labels_outside_the_classes_are_problems():
    source, seen = CountingSource(9, num_classes=6), []
    report, table = survey(source, image_size=4, workers=2, seen=seen.append)
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
    found = list(scan(_Moody(151), workers=4))
    assert [one.index for one in found] == list(range(151))
    assert [one.index for one in found if isinstance(one, Unreadable)] == [3, 150]
    assert "at first, but later" in found[3].reason
    assert "gone away" in found[150].reason
    assert found[7][:5] == Example(7, 7, 4, 4, "", 0)[:5]
    assert len({one.fingerprint for one in found if isinstance(one, Example)}) == 149
