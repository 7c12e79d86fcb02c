import sys

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from sklearn.datasets import load_digits

from deit_jax.data import open_source
from deit_jax.errors import InputError
from tests.oracles.torchvision_ops import import_torchvision


def _save(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value, 0, 0)).save(
        path, format="PNG" if ".png" in path.name else None
    )


def _all(source):
    return [source.fetch(tf.constant(i, tf.int64)) for i in range(source.num_examples)]


def _refused(config, split="train"):
    with pytest.raises(InputError) as caught:
        open_source(config, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path, dataset_config):
    """Classes ant (3 images), bee (10) and cat (2); the eval split has no cat."""
    for number, name in enumerate(["ant"] * 3 + ["bee"] * 10 + ["cat"] * 2):
        _save(tmp_path / "train" / name / f"{number}.jpeg", number)
    for number, name in enumerate(["x.PNG", "b.JPEG", "a.jpg"]):
        _save(tmp_path / "val" / "bee" / name.replace("PNG", "png"), 100 + number)
    _save(tmp_path / "val" / "ant" / "B.JPEG", 7)
    dataset_config.root = str(tmp_path)
    return dataset_config


@pytest.fixture
def flat(tmp_path, dataset_config):
    for name in ("a.jpg", "b.jpg"):
        _save(tmp_path / "train" / name)
    _save(tmp_path / "val" / "c d.jpg")
    dataset_config.update({"root": str(tmp_path), "label_file": "labels.csv"})
    return dataset_config


def _write_labels(flat, text):
    with open(f"{flat.root}/labels.csv", "w") as file:
        file.write(text)


def test_digits_split_is_fixed_stratified_and_complete(dataset_config):
    dataset_config.source = "digits"
    train, evaluation = open_source(dataset_config, "train"), open_source(dataset_config, "eval")
    assert (train.num_examples, evaluation.num_examples) == (1438, 359)
    assert train.num_classes == 10
    assert train.class_names == tuple("0123456789")
    assert not train.encoded
    digits = load_digits()
    rows = {}
    for name, source in (("train", train), ("eval", evaluation)):
        rows[name] = [int(source.example_id(i).removeprefix("digits:"))
                      for i in range(source.num_examples)]  # fmt: skip
        share = np.bincount(digits.target[rows[name]]) / np.bincount(digits.target)
        np.testing.assert_allclose(share, 0.8 if name == "train" else 0.2, atol=0.003)
    assert sorted(rows["train"] + rows["eval"]) == list(range(1797))
    # The split itself is part of published numbers: it must never move.
    assert rows["eval"][:4] == _FIRST_EVAL_DIGITS


_FIRST_EVAL_DIGITS = [2, 4, 5, 12]


def test_digits_are_scikit_learns_images(dataset_config):
    dataset_config.source = "digits"
    digits = load_digits()
    source = open_source(dataset_config, "eval")
    for index in (0, 17, 358):
        image, label = source.fetch(tf.constant(index, tf.int64))
        row = int(source.example_id(index).removeprefix("digits:"))
        want = np.round(digits.images[row] * 255 / 16)
        assert image.dtype == tf.uint8
        assert image.shape == (8, 8, 3)
        for channel in range(3):
            np.testing.assert_array_equal(image[..., channel], want)
        assert label.numpy() == digits.target[row]
        assert label.dtype == tf.int32


def test_digits_refuse_a_wrong_class_count_and_a_missing_package(dataset_config, monkeypatch):
    dataset_config.source = "digits"
    dataset_config.num_classes = 11
    assert "num_classes is 11" in _refused(dataset_config)
    dataset_config.num_classes = 10
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'deit-jax[demo]'" in _refused(dataset_config)


def test_folder_equals_torchvisions_image_folder(folder):
    datasets = import_torchvision().datasets
    for split, name in (("train", "train"), ("eval", "val")):
        source = open_source(folder, split)
        reference = datasets.ImageFolder(f"{folder.root}/{name}")
        assert source.num_classes == 3
        assert source.class_names == ("ant", "bee", "cat")
        ids = [source.example_id(i) for i in range(source.num_examples)]
        assert ids == [path for path, _ in reference.samples]
        for (path, label), (encoded, our_label) in zip(
            reference.samples, _all(source), strict=True
        ):
            with open(path, "rb") as file:
                assert encoded.numpy() == file.read()
            # Here both splits start with the same classes, so their numbers agree.
            assert our_label.numpy() == label


def test_eval_classes_are_numbered_by_the_train_split(folder, tmp_path):
    _save(tmp_path / "val" / "cat" / "c.jpg")
    for file in (tmp_path / "val" / "ant").iterdir():
        file.unlink()
    (tmp_path / "val" / "ant").rmdir()
    labels = [int(label) for _, label in _all(open_source(folder, "eval"))]
    assert labels == [1, 1, 1, 2]


def test_eval_alone_needs_no_train_split(folder):
    folder.train_split = "absent"
    assert open_source(folder, "eval").class_names == ("ant", "bee")


def test_hidden_and_foreign_files_are_left_out(folder, tmp_path):
    (tmp_path / "train" / "ant" / ".0.jpg").write_bytes(b"")
    (tmp_path / "train" / "ant" / "notes.txt").write_bytes(b"")
    assert open_source(folder, "train").num_examples == 15


def test_folder_errors(folder, tmp_path):
    root = folder.root
    folder.root = ""
    assert "root is empty" in _refused(folder)
    folder.root = root + "/nowhere"
    assert "nowhere" in _refused(folder)
    folder.root = root
    folder.eval_split = "validation"
    message = _refused(folder, "eval")
    assert "eval_split is 'validation'" in message
    assert "holds train, val" in message
    folder.eval_split = "val"
    folder.num_classes = 2
    assert "num_classes is 2" in _refused(folder)
    folder.num_classes = 4
    assert "has 3 class folders" in _refused(folder)
    folder.num_classes = 3
    (tmp_path / "train" / "dog").mkdir()
    folder.num_classes = 4
    assert "train/dog holds no images" in _refused(folder)
    (tmp_path / "train" / "dog").rmdir()
    folder.num_classes = 0
    _save(tmp_path / "val" / "elk" / "e.jpg")
    assert "val/elk: this class is not in" in _refused(folder, "eval")
    _save(tmp_path / "train" / "ant" / "t.tiff")
    assert "t.tiff: .tiff images cannot be read" in _refused(folder)
    assert "label_file" in _refused(_flat_without_labels(folder, tmp_path))


def _flat_without_labels(folder, tmp_path):
    _save(tmp_path / "loose" / "a.jpg")
    folder.train_split = "loose"
    return folder


@pytest.mark.parametrize(
    "text",
    [
        "filename,label\ntrain/a.jpg,1\ntrain/b.jpg,0\nval/c d.jpg,2\n",
        "a.jpg 1\n\nb.jpg 0\nc d.jpg 2\n",
        "a.jpg,fox\nb.jpg,elk\nc d.jpg,owl\n",
    ],
)
def test_flat_folder_takes_its_labels_from_the_file(flat, text):
    _write_labels(flat, text)
    train, evaluation = open_source(flat, "train"), open_source(flat, "eval")
    assert [int(label) for _, label in _all(train)] == [1, 0]
    assert [int(label) for _, label in _all(evaluation)] == [2]
    assert evaluation.example_id(0) == f"{flat.root}/val/c d.jpg"
    assert train.num_classes == evaluation.num_classes == 3
    assert train.class_names == (("elk", "fox", "owl") if "fox" in text else ())
    flat.num_classes = 5  # more than the file mentions is allowed
    assert open_source(flat, "train").num_classes == 5


@pytest.mark.parametrize(
    ("text", "num_classes", "message"),
    [
        ("a.jpg,0\nb.jpg,3\nc d.jpg,1\n", 3, "line 2: label 3 of b.jpg is outside the class range"),
        ("a.jpg,0\nb.jpg,-1\nc d.jpg,1\n", 0, "line 2: label -1 of b.jpg"),
        ("a.jpg,x\nb.jpg,y\nc d.jpg,z\n", 2, "class 'z' of c d.jpg is outside"),
        ("a.jpg,0\nc d.jpg,1\n", 0, "train/b.jpg: no label"),
        ("a.jpg,0\nb.jpg,1\nc d.jpg,1\nz.jpg,0\n", 0, "line 4: z.jpg is not in train or val"),
        ("a.jpg,0\na.jpg,1\nb.jpg,1\nc d.jpg,1\n", 0, "line 2: a.jpg already has another label"),
        ("a.jpg\n", 0, "line 1: 'a.jpg', expected 'name,label'"),
        ("\n", 0, "has no rows"),
        (None, 0, "labels.csv does not exist"),
    ],
)
def test_label_file_errors(flat, text, num_classes, message):
    if text is not None:
        _write_labels(flat, text)
    flat.num_classes = num_classes
    assert message in _refused(flat)


def test_a_bare_name_in_both_splits_is_ambiguous(flat, tmp_path):
    _save(tmp_path / "val" / "a.jpg")
    _write_labels(flat, "a.jpg,0\nb.jpg,1\nc d.jpg,1\n")
    assert "write train/a.jpg or val/a.jpg" in _refused(flat)


@pytest.mark.parametrize(("fraction", "counts"), [(0.5, [2, 5, 1]), (0.01, [1, 1, 1])])
def test_train_fraction_is_a_fixed_part_of_every_class(folder, fraction, counts):
    whole = open_source(folder, "train")
    folder.train_fraction = fraction
    part = open_source(folder, "train")
    ids = [part.example_id(i) for i in range(part.num_examples)]
    assert np.bincount([int(label) for _, label in _all(part)]).tolist() == counts
    assert set(ids) < {whole.example_id(i) for i in range(whole.num_examples)}
    again = open_source(folder, "train")
    assert ids == [again.example_id(i) for i in range(again.num_examples)]
    assert open_source(folder, "eval").num_examples == 4


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5])
def test_train_fraction_outside_its_range_is_refused(dataset_config, fraction):
    dataset_config.source = "digits"
    dataset_config.train_fraction = fraction
    assert "train_fraction" in _refused(dataset_config)


def test_unknown_source_and_split_are_refused(dataset_config):
    dataset_config.source = "webdataset"
    assert "expected one of folder, tfds, digits" in _refused(dataset_config)
    assert "expected one of train, eval" in _refused(dataset_config, "test")


def test_tensorflow_sees_no_accelerator():
    assert "deit_jax.data" in sys.modules
    for kind in ("GPU", "TPU"):
        assert not tf.config.get_visible_devices(kind)
