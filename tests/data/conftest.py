"""Configs, pictures, draws and in-memory sources for the tests of the input pipeline."""

import io
import os
import unicodedata

import numpy as np
import pytest
import tensorflow as tf
from ml_collections import FrozenConfigDict
from PIL import Image

from deit_jax import pictures
from deit_jax.config.fields import default_config
from deit_jax.data import InputPlan, Source, open_source
from deit_jax.errors import InputError

_no_autograph = tf.autograph.experimental.do_not_convert
NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
SIDE = 24  # of the images in `folder`, and of what is made of them: few shapes to compile for


@pytest.fixture
def dataset_config():
    config = default_config().dataset
    config.update({"source": "folder", "name": "", "eval_split": "val"})
    return config


@pytest.fixture
def input_config():
    """Random-resized crops and flips of single views."""
    config = default_config().input
    config.update({"auto_augment": "", "repeats": 1})
    return config


@pytest.fixture
def plain_config(input_config):
    """No augmentation: images pass unchanged."""
    input_config.update({"train_crop": "small", "pad": 0, "hflip": 0.0})
    return input_config


def plan_of(input_config, **fields):
    """An input plan; unless told otherwise of 4×4 images, in one group, by one process."""
    fields = {"image_size": 4, "batch_size": 8, "steps_per_epoch": 1, "seed": 0} | fields
    group_size = fields.pop("group_size", fields["batch_size"])
    return InputPlan(input=FrozenConfigDict(input_config), group_size=group_size, **fields)


def refused(config, split="train"):
    """The one line of the error that opening the source ends in."""
    with pytest.raises(InputError) as caught:
        open_source(config, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def picture(seed, height, width):
    """A smooth coloured picture with some noise and hard edges, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.arange(height)[:, None, None], np.arange(width)[:, None]
    waves = np.sin(x * rng.uniform(0.02, 0.3, 3) + y * rng.uniform(0.02, 0.3, 3))
    pixels = 128 + 90 * waves + rng.normal(0, 12, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def encode(image, kind, **options):
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def jpegs(sample_images, tmp_path_factory):
    """Paths of JPEGs: real ones where the sample is at hand, and generated ones of odd kinds."""
    folder = tmp_path_factory.mktemp("jpegs")
    for number, (height, width) in enumerate([(375, 500), (500, 333), (97, 61), (40, 301)]):
        image = Image.fromarray(picture(number, height, width))
        for subsampling in (0, 1, 2):
            path = folder / f"{number}_{subsampling}.jpg"
            image.save(path, quality=85, subsampling=subsampling, progressive=subsampling == 1)
        image.convert("L").save(folder / f"{number}_grey.jpg")
        image.convert("CMYK").save(folder / f"{number}_cmyk.jpg")
    return sorted(sample_images.glob("*/*/*.JPEG"))[::5] + sorted(folder.iterdir())


@pytest.fixture(scope="session")
def photographs(sample_images):
    """(side, count) → so many photographs, uint8 [side, side, 3]."""
    paths = sorted(sample_images.glob("*/*/*.JPEG"))

    def squares(side, count):
        chosen = [paths[number * len(paths) // count] for number in range(count)]
        images = [Image.open(path).convert("RGB") for path in chosen]
        return [np.asarray(i.resize((side, side), Image.Resampling.BICUBIC)) for i in images]

    return squares


@pytest.fixture
def folder(tmp_path, dataset_config):
    """Twelve JPEGs of one size in two classes, as the train and the eval split."""
    for number in range(12):
        path = tmp_path / "train" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number, SIDE, SIDE)).save(path, quality=90)
    (tmp_path / "val").symlink_to(tmp_path / "train")
    dataset_config.root = str(tmp_path)
    return dataset_config


def make_files(root, names):
    """Makes files: images, or text where the suffix is no image's; "a -> b" is a link to b."""
    for name in names:
        name, _, target = name.partition(" -> ")
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if target:
            path.symlink_to(target)
        elif name.endswith("/"):
            path.mkdir()
        elif name.endswith(".fifo.png"):
            os.mkfifo(path)
        elif path.suffix in (".txt", ".xml", ".csv", ".db", ".ini") or path.name == "README":
            path.write_text("no picture")
        else:
            Image.new("RGB", (2, 2)).save(path, "PNG")


def read_split(config, split):
    """What a split holds: {class: its files}, the notes, and the files that do not count."""
    source, read = open_source(config, split), {}
    names = source.class_names or tuple(map(str, range(source.num_classes)))
    for index in range(source.num_examples):
        data, label = source.fetch(tf.constant(index, tf.int64))
        assert pictures.kind(data.numpy()) == "PNG"
        name = source.example_id(index).removeprefix(config.root + "/")
        read.setdefault(names[int(label)], []).append(name)
    assert all("\n" not in note for note in source.notes)
    passed = sorted(name for names in source.passed_over.values() for name in names)
    assert all(any(reason in note for note in source.notes) for reason in source.passed_over)
    return {name: sorted(files) for name, files in read.items()}, " ".join(source.notes), passed


def store_tfds(folder, file_format, files):
    """Prepares the data set "toy" of the image files: all in "train", the first two in "test"."""
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names=["elk", "fox", "owl"]),
        "note": tfds.features.Text(),
    }
    examples = [
        (number, {"image": str(file), "label": number % 3, "note": "unused"})
        for number, file in enumerate(files)
    ]
    tfds.dataset_builders.store_as_tfds_dataset(
        name="toy",
        version="1.2.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={"train": examples, "test": examples[:2]},
        data_dir=str(folder),
        file_format=file_format,
    )


def graph(function, *specs):
    """The function as a graph, traced once for arguments of these types and shapes."""
    signature = [tf.TensorSpec(shape, kind) for kind, shape in specs]
    return tf.function(function, input_signature=signature, autograph=False)


def drawn(draw, count):
    """What `draw` makes of the seeds [5, 0], [5, 1] …: every part as an array [count, …]."""
    seeds = np.stack([np.full(count, 5), np.arange(count)], axis=1)
    dataset = tf.data.Dataset.from_tensor_slices(seeds).map(_no_autograph(draw)).batch(count)
    return next(dataset.as_numpy_iterator())


def uncorrelated(columns):
    """Whether no two of the columns [c, n] of independent draws go together."""
    pairs = np.triu_indices(len(columns), 1)
    return np.abs(np.corrcoef(columns)[pairs]).max() < 4.5 / np.sqrt(len(columns[0]))


def check_stateless(function, *, count, distinct):
    """Checks that a function of a seed is one, eagerly and in maps of one and several threads."""
    seeds = [tf.constant([7, i], tf.int64) for i in range(count)]
    dataset, function = tf.data.Dataset.from_tensor_slices(seeds), _no_autograph(function)
    runs = [
        list(dataset.map(function, num_parallel_calls=calls).as_numpy_iterator())
        for calls in (1, 4)
    ]
    np.testing.assert_array_equal(*runs)
    for seed, mapped in zip(seeds[:8], runs[0], strict=False):
        np.testing.assert_array_equal(function(seed), mapped)
    assert len({result.tobytes() for result in runs[0]}) > distinct


def permutation(num_examples, seed, epoch):
    """The examples in the order of an epoch, [num_examples]."""
    order = np.arange(num_examples)
    for byte in (0, 1, 2, 3):
        key = [seed >> 8 * byte, epoch >> 8 * byte]
        if byte == 0 or any(key):
            shuffled = tf.random.experimental.index_shuffle(
                tf.range(num_examples, dtype=tf.int64),
                seed=tf.constant(key, tf.int64),
                max_index=num_examples - 1,
            )
            order = shuffled.numpy()[order]
    return order


class CountingSource(Source):
    """Example i is a 4×4 image of value i with label i."""

    is_read = False

    def __init__(self, num_examples, num_classes=None):
        super().__init__(
            description="counting",
            num_examples=num_examples,
            num_classes=num_classes or num_examples,
            class_names=(),
        )

    def fetch(self, index):
        return tf.fill((4, 4, 3), tf.cast(index, tf.uint8)), tf.cast(index, tf.int32)

    def fingerprint(self):
        return f"{self.num_examples:016x}"

    def example_id(self, index):
        return f"counting:{index}"
