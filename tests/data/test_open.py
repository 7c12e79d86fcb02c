"""Folders and the digits against torchvision and scikit-learn, and mistakes in them by name."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from sklearn.datasets import load_digits

from deit_jax.data import open_source
from tests.data.conftest import refused
from tests.oracles.torchvision_ops import import_torchvision


def _save(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "PNG" if path.suffix == ".png" else None
    Image.new("RGB", (4, 4), (value, 0, 0)).save(path, format=kind)


def _all(source):
    return [source.fetch(tf.constant(i, tf.int64)) for i in range(source.num_examples)]


def _labels(source):
    return [int(label) for _, label in _all(source)]


def _names(source):
    return [source.example_id(i) for i in range(source.num_examples)]


@pytest.fixture
def animals(tmp_path, dataset_config):
    """Classes ant (3 images), bee (10) and cat (2); the eval split has no cat."""
    for number, name in enumerate(["ant"] * 3 + ["bee"] * 10 + ["cat"] * 2):
        _save(tmp_path / "train" / name / f"{number}.jpeg", number)
    for number, name in enumerate(["x.png", "b.JPEG", "a.jpg"]):
        _save(tmp_path / "val" / "bee" / name, 100 + number)
    _save(tmp_path / "val" / "ant" / "B.JPEG", 7)
    dataset_config.root = str(tmp_path)
    return dataset_config


@pytest.fixture
def flat(tmp_path, dataset_config):
    for name in ("train/a.jpg", "train/b.jpg", "val/c d.jpg"):
        _save(tmp_path / name)
    dataset_config.update({"root": str(tmp_path), "label_file": "labels.csv"})
    return dataset_config


def test_digits_split_is_fixed_stratified_and_complete(dataset_config):
    dataset_config.source = "digits"
    digits, rows = load_digits(), {}
    for split, count, share in (("train", 1438, 0.8), ("eval", 359, 0.2)):
        source = open_source(dataset_config, split)
        assert source.num_examples == count
        assert source.class_names == tuple("0123456789")
        rows[split] = [int(name.removeprefix("digits:")) for name in _names(source)]
        found = np.bincount(digits.target[rows[split]]) / np.bincount(digits.target)
        np.testing.assert_allclose(found, share, atol=0.003)
        for row, (image, label) in list(zip(rows[split], _all(source), strict=True))[::50]:
            want = np.round(digits.images[row] * 255 / 16)
            np.testing.assert_array_equal(image, np.stack([want] * 3, axis=-1))
            assert label.numpy() == digits.target[row]
            assert (image.dtype, label.dtype) == (tf.uint8, tf.int32)
    assert sorted(rows["train"] + rows["eval"]) == list(range(1797))
    # The split itself is part of published numbers: it must never move.
    assert rows["eval"][:4] == [2, 4, 5, 12]


def test_digits_refuse_a_wrong_class_count_and_a_missing_package(dataset_config, monkeypatch):
    dataset_config.update({"source": "digits", "num_classes": 11})
    assert "num_classes is 11" in refused(dataset_config)
    dataset_config.num_classes = 10
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'deit-jax[demo]'" in refused(dataset_config)


def test_folder_equals_torchvisions_image_folder(animals):
    for split, name in (("train", "train"), ("eval", "val")):
        source = open_source(animals, split)
        reference = import_torchvision().datasets.ImageFolder(f"{animals.root}/{name}")
        assert source.num_classes == 3
        assert source.class_names == ("ant", "bee", "cat")
        # Here both splits start with the same classes, so their numbers agree.
        assert list(zip(_names(source), _labels(source), strict=True)) == reference.samples
        for (path, _), (encoded, _) in zip(reference.samples, _all(source), strict=True):
            with open(path, "rb") as file:
                assert encoded.numpy() == file.read()


def test_eval_classes_are_numbered_by_the_train_split(animals, tmp_path):
    (tmp_path / "val" / "ant").rename(tmp_path / "val" / "cat")
    assert _labels(open_source(animals, "eval")) == [1, 1, 1, 2]
    animals.train_split = "absent"  # whoever evaluates needs no train split
    assert open_source(animals, "eval").class_names == ("bee", "cat")


@pytest.mark.parametrize(
    ("change", "file", "split", "message"),
    [
        ({"root": ""}, None, "train", "root is empty"),
        ({"root": "nowhere"}, None, "train", "root is 'nowhere'"),
        ({"num_classes": 2}, None, "train", "num_classes is 2"),
        ({"num_classes": 4}, None, "train", "3 class folders"),
        ({}, "train/dog/notes.txt", "train", "train/dog holds no images"),
        ({}, "val/elk/e.jpg", "eval", "val/elk"),
        ({}, "train/ant/t.heic", "train", "t.heic"),
        ({"train_split": "loose"}, "loose/a.jpg", "train", "label_file"),
        ({"source": "webdataset"}, None, "train", "folder, tfds, digits"),
    ],
)
def test_mistakes_are_named(animals, tmp_path, change, file, split, message):
    animals.update(change)
    if file:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert message in refused(animals, split)


@pytest.mark.parametrize(
    "text",
    [
        "filename,label\ntrain/a.jpg,1\ntrain/b.jpg,0\nval/c d.jpg,2\n",
        "a.jpg 1\n\nb.jpg 0\nc d.jpg 2\n",
        "a.jpg,fox\nb.jpg,elk\nc d.jpg,owl\n",
    ],
)
def test_flat_folder_takes_its_labels_from_the_file(flat, tmp_path, text):
    (tmp_path / "labels.csv").write_text(text)
    train, evaluation = open_source(flat, "train"), open_source(flat, "eval")
    assert _labels(train) == [1, 0]
    assert _labels(evaluation) == [2]
    assert evaluation.example_id(0) == f"{flat.root}/val/c d.jpg"
    assert train.num_classes == evaluation.num_classes == 3
    assert train.class_names == (("elk", "fox", "owl") if "fox" in text else ())
    flat.num_classes = 5  # more than the file mentions is allowed
    assert open_source(flat, "train").num_classes == 5


@pytest.mark.parametrize(
    ("text", "num_classes", "message"),
    [
        ("a.jpg,0\nb.jpg,3\nc d.jpg,1\n", 3, "line 2: label 3 of b.jpg"),
        ("a.jpg,0\nb.jpg,-1\nc d.jpg,1\n", 0, "line 2: label -1 of b.jpg"),
        ("a.jpg,x\nb.jpg,y\nc d.jpg,z\n", 2, "class 'z' of c d.jpg"),
        ("a.jpg,0\nc d.jpg,1\n", 0, "train/b.jpg: no label"),
        ("a.jpg,0\nb.jpg,1\nc d.jpg,1\nz.jpg,0\n", 0, "line 4: z.jpg"),
        ("a.jpg,0\na.jpg,1\nb.jpg,1\nc d.jpg,1\n", 0, "line 2: a.jpg"),
        ("a.jpg\n", 0, "line 1: 'a.jpg'"),
        ("\n", 0, "has no rows"),
        (None, 0, "labels.csv cannot be read (No such file"),
    ],
)
def test_label_file_errors(flat, tmp_path, text, num_classes, message):
    if text is not None:
        (tmp_path / "labels.csv").write_text(text)
    flat.num_classes = num_classes
    assert message in refused(flat)


def test_a_bare_name_in_both_splits_is_ambiguous(flat, tmp_path):
    _save(tmp_path / "val" / "a.jpg")
    (tmp_path / "labels.csv").write_text("a.jpg,0\nb.jpg,1\nc d.jpg,1\n")
    assert "write train/a.jpg or val/a.jpg" in refused(flat)


@pytest.mark.parametrize(("fraction", "counts"), [(0.5, [2, 5, 1]), (0.01, [1, 1, 1])])
def test_train_fraction_is_a_fixed_part_of_every_class(animals, fraction, counts):
    whole = _names(open_source(animals, "train"))
    animals.train_fraction = fraction
    part = open_source(animals, "train")
    assert np.bincount(_labels(part)).tolist() == counts
    assert set(_names(part)) < set(whole)
    assert _names(part) == _names(open_source(animals, "train"))
    assert open_source(animals, "eval").num_examples == 4


def test_tensorflow_sees_no_accelerator():
    for kind in ("GPU", "TPU"):
        assert not tf.config.get_visible_devices(kind)
