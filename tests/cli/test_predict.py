"""predict: figures against NumPy, its three outputs, and pictures and models that are broken."""

import csv
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

import deit_jax
from deit_jax.cli.predict import find_images
from deit_jax.inference.predict import predict
from deit_jax.models import imagenet
from deit_jax.models.network import Network


@pytest.fixture
def predict_command(deit_jax_command):
    """Predicts with a model: predict_command(folder, *images and flags)."""
    return lambda folder, *rest: deit_jax_command("predict", "--model", folder, *rest)


def _objects(text):
    return [json.loads(line) for line in text.splitlines()]


def _save(folder, name, class_names, **changes):
    """A small model in which classes differ by more than a rounding; its folder and itself."""
    model = deit_jax.create_model(name, num_classes=len(class_names), depth=1, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for head in (model.head, getattr(model, "head_dist", None)):
        if head is not None:
            head.kernel[...] = rng.normal(0, 0.4, head.kernel.shape)
    model.info = dataclasses.replace(model.info, class_names=class_names, **changes)
    deit_jax.save_model(folder, model)
    return str(folder), model


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """A distilled model of seven classes, two of them WordNet ids."""
    names = ("n01440764", "n15075141", "ant", "bee, small", "cat", "dog", "eel")
    return _save(tmp_path_factory.mktemp("d") / "model", "deit_testing_distilled", names)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model with one head that crops; three classes."""
    folder = tmp_path_factory.mktemp("p") / "model"
    return _save(folder, "deit_testing", ("a", "b", "c"), crop_ratio=0.875)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of seven pictures of several kinds and sizes, with other things between them."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    (root / "sub" / "deeper").mkdir(parents=True)
    (root / "folder.jpg").mkdir()
    (root / "notes.txt").write_text("no picture")
    names = ("b.jpg", "a.PNG", "sub/c.webp", "sub/deeper/d.JPEG", "e.bmp", "f.gif", "g.tiff")
    for number, name in enumerate(names):
        coarse = rng.integers(0, 256, (3, 3, 3), np.uint8)
        picture = Image.fromarray(coarse).resize((40 + 9 * number, 50), Image.Resampling.BICUBIC)
        picture.save(root / name)
    return root


def _softmax(logits):
    exponents = np.exp(np.float64(logits) - np.max(logits))
    return exponents / exponents.sum()


def _expected(model, file):
    """The probabilities of the mean and of each head, for one picture on its own."""
    heads = [np.asarray(h)[0] for h in model.heads(deit_jax.preprocess(model, file))]
    return _softmax(np.mean(heads, 0)), [_softmax(head) for head in heads]


def _check(found, probabilities, class_names, topk):
    order = np.argsort(-probabilities)[:topk]
    assert [one["index"] for one in found] == order.tolist()
    assert [one["class"] for one in found] == [class_names[i] for i in order]
    assert [one["name"] for one in found] == [imagenet.readable(class_names[i]) for i in order]
    np.testing.assert_allclose(
        [one["probability"] for one in found], probabilities[order], rtol=1e-4, atol=1e-6
    )


def _sorted_photos(root):
    return sorted(p for p in root.rglob("*") if p.is_file() and p.suffix != ".txt")


def test_json_of_a_folder_has_every_pictures_own_figures(predict_command, distilled, photos):
    folder, model = distilled
    # Seven pictures in batches of three: two full ones and one filled up.
    status, out, err = predict_command(folder, photos, "--json", "--topk=4", "--batch_size=3")
    assert status == 0
    assert "7/7" in err, "a folder has a progress bar"
    lines = _objects(out)
    assert [line["file"] for line in lines] == list(map(str, _sorted_photos(photos)))
    assert len(lines) == 7
    best = []
    for line in lines:
        mean, heads = _expected(model, line["file"])
        _check(line["predictions"], mean, model.info.class_names, 4)
        assert list(line["heads"]) == ["class", "distillation"]
        for found, want in zip(line["heads"].values(), heads, strict=True):
            _check(found, want, model.info.class_names, 4)
        best.append(mean.max())
    assert np.diff(np.sort(best)).min() > 1e-3, "no two pictures look alike to the model"


def test_text_of_one_picture(predict_command, distilled, photos):
    folder, model = distilled
    file = photos / "b.jpg"
    status, out, err = predict_command(folder, file, "--topk=99")
    assert (status, err) == (0, ""), "one picture has no progress bar"
    names = list(map(imagenet.readable, model.info.class_names))
    mean, heads = _expected(model, file)
    order = enumerate(np.argsort(-mean), 1)
    want = [f"{rank:4} {100 * mean[i]:7.2f} %  {names[i]}" for rank, i in order]
    for head, p in zip(("class", "distillation"), heads, strict=True):
        want.append(f"     {100 * p.max():6.2f} %  {names[p.argmax()]}  ({head} head)")
    assert out.splitlines() == [str(file), *want]
    assert len(want) == 7 + 2


def test_csv_on_stdout_and_in_a_file_agree_with_json(predict_command, distilled, photos, tmp_path):
    common, file = (distilled[0], photos, "--topk=2"), tmp_path / "found.csv"
    on_stdout = predict_command(*common).out
    lines = _objects(predict_command(*common, "--json", "--csv", file).out)
    assert file.read_text() == on_stdout
    assert predict_command(*common, "--csv", file).out == ""
    assert file.read_text() == on_stdout
    assert list(tmp_path.iterdir()) == [file]

    rows = list(csv.reader(io.StringIO(on_stdout)))
    columns = ("1", "2", "class-head", "distillation-head")
    assert rows[0] == ["file"] + [f"{k}-{c}" for c in columns for k in ("name", "probability")]
    assert len(rows) == 1 + len(lines) == 8
    for row, line in zip(rows[1:], lines, strict=True):
        found = line["predictions"] + [line["heads"][h][0] for h in ("class", "distillation")]
        want = [str(one[key]) for one in found for key in ("name", "probability")]
        assert row == [line["file"], *want]


def test_one_compilation_of_the_smallest_batch(predict_command, plain, photos, monkeypatch):
    shapes, call = [], Network.__call__

    def counted(self, variables, images, key=None):
        shapes.append(images.shape)
        return call(self, variables, images, key)

    monkeypatch.setattr(Network, "__call__", counted)
    assert predict_command(plain[0], photos, "--batch_size=3").status == 0
    assert predict_command(plain[0], photos / "b.jpg").status == 0
    assert shapes == [(3, 32, 32, 3), (1, 32, 32, 3)]


def test_unreadable_pictures_are_named(predict_command, plain, photos, tmp_path):
    folder, model = plain
    for number, source in enumerate(_sorted_photos(photos)[:5]):
        Image.open(source).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes((photos / "a.PNG").read_bytes()[:100])
    (tmp_path / "3.png").write_text("no picture")
    (tmp_path / "5.png").symlink_to(tmp_path / "gone.png")
    flags = ("--json", "--batch_size=3", "--csv", tmp_path / "found.csv")
    status, found, err = predict_command(folder, tmp_path, *flags)
    assert status == 1
    lines = _objects(found)
    assert [Path(line["file"]).name for line in lines] == ["0.png", "2.png", "4.png"]
    for line in lines:  # each its own, though others before them in the batch are missing
        assert set(line) == {"file", "predictions"}, "one head says no more"
        _check(line["predictions"], _expected(model, line["file"])[0], ("a", "b", "c"), 3)
    for number in (1, 3, 5):
        assert err.count(f"{tmp_path / f'{number}.png'}: ") == 1
    assert "Traceback" not in err
    assert len((tmp_path / "found.csv").read_text().splitlines()) == 1 + 3


def test_any_failure_of_a_decoder_is_a_line(predict_command, plain, photos, monkeypatch):
    def broken(*_):
        raise ValueError("bad\ndata")

    monkeypatch.setattr(JpegImageFile, "load", broken)
    line = f"{photos / 'b.jpg'}: cannot be read as JPEG: bad data\n"
    assert predict_command(plain[0], photos / "b.jpg") == (1, "", line)


def test_a_bug_is_no_line_about_a_picture(predict_command, plain, photos, monkeypatch):
    def broken(*_):
        raise KeyError("ours")

    monkeypatch.setattr("deit_jax.inference.preprocess._resize_and_crop", broken)
    with pytest.raises(KeyError, match="ours"):
        predict_command(plain[0], photos / "b.jpg")


@pytest.mark.parametrize("flags", [(), ("--json",)])
@pytest.mark.parametrize("many", [False, True])
def test_names_do_nothing_to_the_terminal(predict_command, photos, tmp_path, flags, many):
    """Of classes and of files; also of one that is not a picture."""
    odd = "\x1b[2J\x9b\x07\r"
    folder, _ = _save(tmp_path / "model", "deit_testing", (f"a{odd}", f"b{odd}\nc"))
    place = tmp_path / "pictures"
    place.mkdir()
    shutil.copy(photos / "b.jpg", place / f"{odd}.jpg")
    (place / f"{odd}.png").write_bytes(b"no picture")
    (place / f"{odd}.txt").touch()
    images = [place] if many else sorted(place.glob("*.[jp]*"))
    status, out, err = predict_command(folder, *images, *flags)
    assert status == 1
    assert "begins with" in err
    for text in ("\x1b[2J", "\x9b", "\x07"):
        assert text not in out + err


def test_a_pipe_is_not_waited_for(predict_command, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    line = f"error: {tmp_path / 'pipe'} is neither a file nor a folder\n"
    assert predict_command(tmp_path, tmp_path / "pipe") == (2, "", line)


def test_linked_folders_are_searched_and_files_stay_in_order(photos, tmp_path):
    files = [photos / "e.bmp", photos / "a.PNG"]
    assert find_images(files) == files
    (tmp_path / "link").symlink_to(photos)
    linked = [tmp_path / "link" / file.relative_to(photos) for file in _sorted_photos(photos)]
    assert find_images([str(tmp_path)]) == linked


def test_models_that_cannot_predict(predict_command, photos, tmp_path):
    good, model = _save(tmp_path / "model", "deit_testing", ("a", "b"))
    model.head.bias[...] = np.full(2, np.nan, np.float32)
    deit_jax.save_model(good, model, replace=True)
    model.reset_classifier(0)
    deit_jax.save_model(tmp_path / "none", model)
    for folder, words in (
        (photos, "is not a model folder"),
        (good, "the logits are not finite"),
        (tmp_path / "none", "has no classes to predict"),
    ):
        flags = (photos / "b.jpg", "--csv", tmp_path / "x.csv")
        status, out, err = predict_command(folder, *flags)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert words in err
        assert not (tmp_path / "x.csv").exists(), "a CSV has its name only when complete"


def test_classes_without_names_have_their_numbers(photos):
    model = deit_jax.create_model("deit_testing", num_classes=2, depth=1, rngs=nnx.Rngs(0))
    (result,) = predict(model, [photos / "b.jpg"], topk=2, batch_size=16)
    assert {one["name"] for one in result["predictions"]} == {"class 0", "class 1"}


def test_stops_with_its_reader(repo_root, distilled, photos):
    script = str(repo_root / "tools" / "predict.py")
    command = [sys.executable, script, "--model", distilled[0], str(photos)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        err = process.stderr.read().decode()
    assert process.returncode == 1
    assert "Error" not in err
