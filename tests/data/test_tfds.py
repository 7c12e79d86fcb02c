"""Prepared TFDS data sets against TFDS's own readers, and a whole run on one."""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

import deit_jax
from deit_jax.config.files import load_config
from deit_jax.data import open_source
from deit_jax.data.decode import decode
from tests.data.conftest import picture, refused, store_tfds

_COUNT = 11


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / f"{number}.jpg" for number in range(_COUNT)]
    for number, path in enumerate(paths):
        Image.fromarray(picture(number, 20 + number, 30)).save(path)
    return paths


@pytest.fixture(scope="module")
def stored(tmp_path_factory, files):
    """Format → data_dir with the same images."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("tfrecord", "array_record")}
    for kind, folder in folders.items():
        store_tfds(folder, kind, files)
    return folders


@pytest.fixture
def config(dataset_config):
    dataset_config.update({"source": "tfds", "name": "toy", "eval_split": "test"})
    return dataset_config


def _examples(source):
    """Bytes and label of every example, read inside a tf.data graph by several threads."""
    dataset = tf.data.Dataset.range(source.num_examples).map(source.fetch, num_parallel_calls=4)
    return [(data, int(label)) for data, label in dataset.as_numpy_iterator()]


@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
def test_both_formats_give_the_bytes_of_the_files_in_tfds_order(config, stored, files, kind):
    config.root = str(stored[kind])
    source = open_source(config, "train")
    assert (source.num_examples, source.num_classes) == (_COUNT, 3)
    assert source.class_names == ("elk", "fox", "owl")
    assert source.example_id(4) == "train:4"
    examples = _examples(source)
    want = {path.read_bytes(): number % 3 for number, path in enumerate(files)}
    assert dict(examples) == want
    # TFDS's readers decode, each its own way: every image has another height, so compare shapes.
    builder = tfds.builder("toy", data_dir=config.root)
    read = builder.as_dataset if kind == "tfrecord" else builder.as_data_source
    for (data, label), row in zip(examples, read(split="train"), strict=True):
        assert tuple(tf.io.extract_jpeg_shape(data)) == row["image"].shape
        assert label == row["label"]
    assert open_source(config, "eval").num_examples == 2


@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
def test_subsplits_and_fractions(config, stored, kind):
    config.root = str(stored[kind])
    whole = _examples(open_source(config, "train"))
    config.train_split, config.eval_split = "train[:60%]", "train[60%:]"
    parts = [open_source(config, split) for split in ("train", "eval")]
    assert _examples(parts[0]) + _examples(parts[1]) == whole
    assert parts[1].example_id(1) == "train[60%:]:1"
    config.train_split, config.eval_split = "train+test", "test"
    union, test = (_examples(open_source(config, split)) for split in ("train", "eval"))
    assert union == whole + test
    config.train_split, config.train_fraction = "train", 0.5
    half = open_source(config, "train")
    numbers = [int(half.example_id(i).removeprefix("train:")) for i in range(half.num_examples)]
    assert len(set(numbers)) == round(_COUNT / 2)
    assert _examples(half) == [whole[number] for number in numbers]
    config.train_fraction = 0.01
    assert open_source(config, "train").num_examples == 1


@pytest.mark.parametrize(
    ("change", "split", "message"),
    [
        ({"name": "imagenet2012", "root": "nowhere"}, "train", "nowhere"),  # known, not prepared
        ({"name": ""}, "train", "name is empty"),
        ({"name": "no good!"}, "train", "'no good!'"),
        ({"name": "toy:2.*.*"}, "train", "'toy:2.*.*'"),
        ({"name": "toy/config=3"}, "train", "'toy/config=3', but no such prepared data set"),
        ({"eval_split": "validation"}, "eval", "eval_split is 'validation'"),
        ({"eval_split": "validation"}, "eval", "train, test"),
        ({"num_classes": 2}, "train", "3 classes"),
    ],
)
def test_mistakes_are_named(config, stored, change, split, message):
    config.root = str(stored["tfrecord"])
    config.update(change)
    found = refused(config, split)
    assert message in found
    assert len(found) < 300


@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
@pytest.mark.parametrize("part", ["train[5:5]", "train[:1%]", "train[4:4]+test[:1%]"])
def test_a_part_without_records_is_named(config, stored, kind, part):
    config.root, config.train_split = str(stored[kind]), part
    message = refused(config)
    assert f"train_split is {part!r}" in message
    assert message.endswith("has no records; splits and sizes: {'train': 11, 'test': 2}")


def test_a_version_and_more_classes_can_be_asked_for(config, stored):
    config.update({"root": str(stored["tfrecord"]), "name": "toy:1.*.*", "num_classes": 4})
    source = open_source(config, "train")
    assert (source.num_examples, source.num_classes) == (_COUNT, 4)


def test_features_must_hold_an_image_and_a_class(config, tmp_path, files):
    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(encoding_format="jpeg"), "label": tfds.features.Text()}
    )
    tfds.dataset_builders.store_as_tfds_dataset(
        name="odd",
        version="1.0.0",
        features=features,
        split_datasets={"train": [(0, {"image": str(files[0]), "label": "x"})]},
        data_dir=str(tmp_path),
    )
    config.name, config.root = "odd", str(tmp_path)
    assert "label (Text)" in refused(config)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_pixels_are_tfds_own_or_refused(config, tmp_path, dtype):
    """TFDS stores the bytes of a float32 as the four channels of a PNG."""
    shape = (12, 10, 1 if dtype == np.float32 else 3)
    pixels = np.random.default_rng(0).integers(0, 2**16, shape).astype(dtype)
    features = {
        "image": tfds.features.Image(shape=shape, dtype=dtype, encoding_format="png"),
        "label": tfds.features.ClassLabel(num_classes=2),
    }
    tfds.dataset_builders.store_as_tfds_dataset(
        name="odd",
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={"train": [(0, {"image": pixels, "label": 1})]},
        data_dir=str(tmp_path),
    )
    config.name, config.root = "odd", str(tmp_path)
    if dtype == np.float32:
        assert "images of float32, expected uint8 or uint16" in refused(config)
        return
    ((data, label),) = _examples(open_source(config, "train"))
    want = pixels if dtype == np.uint8 else pixels >> 8
    np.testing.assert_array_equal(decode(tf.constant(data)), want)
    assert label == 1


def test_a_file_cut_short_is_named(config, tmp_path, files):
    store_tfds(tmp_path, "tfrecord", files)
    config.root = str(tmp_path)
    (path,) = tmp_path.glob("toy/1.2.0/toy-train*")
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    message = refused(config)
    assert str(path) in message
    assert f"expected {_COUNT}" in message
    path.unlink()
    assert str(path) in refused(config)


def test_a_missing_array_record_file_is_named(config, tmp_path, files):
    store_tfds(tmp_path, "array_record", files)
    config.root = str(tmp_path)
    (path,) = tmp_path.glob("toy/1.2.0/toy-train*")
    path.unlink()
    assert f"{path}: cannot be read" in refused(config)


@pytest.mark.slow
def test_a_run_trains_on_tfds_and_evaluates_every_example(stored, files, tmp_path):
    """It learns the images by heart, and the report is PIL's and NumPy's from the same files."""
    config = load_config("digits")
    config.dataset.update({"source": "tfds", "name": "toy", "root": str(stored["tfrecord"])})
    config.dataset.eval_split = "train+test"  # 13 examples: the last batch is not full
    config.input.pad, config.model.drop_path_rate = 0, 0.0
    config.mixing.update({"prob": 0.0, "random_erasing": 0.0, "smoothing": 0.0})
    config.schedule.update({"epochs": 40, "warmup_epochs": 1})
    config.train.update({"batch_size": 4, "ema_decay": 0.0})
    trained = deit_jax.train(config, str(tmp_path))
    report = deit_jax.evaluate(config, str(tmp_path))
    assert report == trained

    shown = [*files, *files[:2]]
    labels = np.array([number % 3 for number in (*range(_COUNT), 0, 1)])
    images = [Image.open(file).resize((32, 32), Image.Resampling.BICUBIC) for file in shown]
    logits = deit_jax.load_model(str(tmp_path / "model"))(np.stack(images) / 127.5 - 1)
    logits = np.asarray(logits, np.float64)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
    assert report["num_examples"] == len(labels)
    assert report["top1"] == 100.0 * (logits.argmax(axis=1) == labels).mean() == 100.0
    assert report["loss"] == pytest.approx(losses.mean(), rel=1e-4)
