"""Hugging Face data sets against the files they were made of. Nothing may be downloaded."""

import socket
import sys

import datasets
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from deit_jax.data import eval_batches, open_source
from deit_jax.errors import InputError, TransientError
from tests.data.conftest import encode, picture, plan_of, refused

_KIND = datasets.ClassLabel(names=["elk", "fox", "owl"])
_FILES = [  # more than the library writes at a time
    encode(Image.fromarray(picture(n, 5 + n % 9, 7)), ("JPEG", "PNG")[n % 2]) for n in range(130)
]
_IMAGES = (datasets.Image(), [{"bytes": data, "path": f"a/{n}"} for n, data in enumerate(_FILES)])
_NUMBERS, _TEXTS = (datasets.Value("int64"), [7, 2**32]), (datasets.Value("string"), ["a", "b"])


def _write(file, count=2, **columns):
    """Writes a Parquet file of the first images; columns are (kind, values) by name."""
    columns = {"image": _IMAGES, "label": (_KIND, [n % 3 for n in range(count)])} | columns
    file.parent.mkdir(parents=True, exist_ok=True)
    values = {name: values[:count] for name, (_, values) in columns.items()}
    features = datasets.Features({name: kind for name, (kind, _) in columns.items()})
    datasets.Dataset.from_dict(values, features).to_parquet(file)


@pytest.fixture
def config(dataset_config, tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a download"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    dataset_config.update({"source": "hf", "root": str(tmp_path / "data"), "eval_split": "train"})
    return dataset_config


def _examples(source):
    """Bytes and label of every example, read inside a tf.data graph by several threads."""
    dataset = tf.data.Dataset.range(source.num_examples).map(source.fetch, num_parallel_calls=8)
    return [(data, int(label)) for data, label in dataset.as_numpy_iterator()]


def test_every_row_gives_the_bytes_of_its_file_and_its_label(config, tmp_path):
    for name, count in (("train-0", 130), ("train-1", 4), ("test", 7)):
        _write(tmp_path / "data" / f"{name}.parquet", count)
    config.eval_split = "test"
    train, evaluation = (open_source(config, split) for split in ("train", "eval"))
    rows = [(data, n % 3) for n, data in enumerate(_FILES)]
    assert len(train.files) > 2  # parts of the table, so that they have to be found
    assert (_examples(train), _examples(evaluation)) == (rows + rows[:4], rows[:7])
    assert (train.num_classes, train.class_names) == (3, ("elk", "fox", "owl"))
    config.update({"train_split": "train[50%:]+test", "train_fraction": 0.5, "num_classes": 4})
    part, whole = open_source(config, "train"), rows[67:] + rows[:4] + rows[:7]
    numbers = [int(part.example_id(n).removeprefix("train[50%:]+test:")) for n in range(37)]
    assert len(set(numbers)) == part.num_examples == 37
    assert _examples(part) == [whole[number] for number in numbers]
    assert (part.num_classes, part.class_names) == (4, ())


def test_the_fingerprint_depends_on_the_rows_alone(config, tmp_path):
    def fingerprint(folder, *images, **columns):
        config.root = str(tmp_path / folder)
        _write(tmp_path / folder / "train.parquet", image=(_IMAGES[0], images), **columns)
        return open_source(config, "train").fingerprint()

    one, other, third = ({"bytes": b"x" * n, "path": f"{n % 2}/a"} for n in (8, 8, 9))
    first = fingerprint("a", one, one)
    assert fingerprint("b", one, other) == first
    assert fingerprint("b", one, third) != first  # also, what the library keeps is not stale
    assert fingerprint("c", one, one | {"path": "b"}) != first
    assert fingerprint("d", one, one, label=(_KIND, [0, 2])) != first


def test_batches_of_images_that_stay_in_their_files(config, plain_config, tmp_path):
    pixels = [picture(n, 8, 8) for n in range(5)]
    for n, image in enumerate(pixels):
        path = tmp_path / "data" / "train" / "ab"[n % 2] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    source, plan = open_source(config, "eval"), plan_of(plain_config, image_size=8, batch_size=5)
    (batch,) = eval_batches(source, plan)
    np.testing.assert_array_equal(batch["image"], [pixels[n] for n in (0, 2, 4, 1, 3)])
    assert batch["label"].tolist() == [0, 0, 0, 1, 1]
    (tmp_path / "data/train/b/3.png").unlink()
    with pytest.raises(InputError, match="train:4 cannot be used: FileNotFoundError"):
        next(eval_batches(source, plan))


@pytest.mark.parametrize(
    ("fields", "columns", "message"),
    [
        ("name=a/b", {}, "name is 'a/b' and root is"),
        ("root=", {}, "name is '' and root is '', expected OWNER/NAME"),
        ("root= name=imagenet2012", {}, "'imagenet2012' and root is ''"),
        ("root= name=tests/data", {}, "'tests/data' and root is ''"),
        ("root=gs://a/b", {}, "root is 'gs://a/b'"),
        ("name=:other", {}, "data:other: BuilderConfig 'other' not found"),
        ("eval_split=val", {}, "Should be one of ['train']"),
        ("eval_split=train[2:1]", {}, "ends before it begins; splits and sizes: {'train': 2}"),
        ("num_classes=2", {}, "num_classes is 2, but"),
        ("", {"label": _NUMBERS}, "does not say how many classes"),
        ("", {"label": _TEXTS}, "columns image (Image), label (Value), expected one"),
        ("", {"image": _TEXTS}, "columns image (Value), label (ClassLabel), expected one Image"),
        ("", {"mask": _IMAGES}, "mask (Image)"),
        ("", {"fine": (_KIND, [0, 0])}, "fine (ClassLabel)"),
        ("", {"label": _NUMBERS, "id": _NUMBERS}, "id (Value)"),
        ("", {"image": (_IMAGES[0], [_FILES[0], None])}, "train:1 cannot be used: the row holds"),
        ("", {"label": (_KIND, [2, -1]), "id": _NUMBERS}, "label outside the class range"),
        ("", {"label": (_KIND, [2, None])}, "label outside the class range"),
        ("num_classes=8", {"label": _NUMBERS}, "label outside the class range"),
    ],
)
def test_mistakes_are_named(config, plain_config, tmp_path, fields, columns, message):
    _write(tmp_path / "data" / "train.parquet", **columns)
    for name, value in (field.split("=", 1) for field in fields.split()):
        config[name] = type(config[name])(value)
    with pytest.raises(InputError) as caught:
        next(eval_batches(open_source(config, "eval"), plan_of(plain_config)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_is_asked_for_on_the_hub(config, monkeypatch):
    def load(*arguments, **options):
        assert (arguments, options) == (("owner/name", "small"), {"split": "train"})
        raise ConnectionError("no answer")

    monkeypatch.setattr(datasets, "load_dataset", load)
    config.update({"root": "", "name": "owner/name:small"})
    with pytest.raises(TransientError, match="owner/name:small: no answer"):
        open_source(config, "train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'deit-jax[hf]'" in refused(config)
