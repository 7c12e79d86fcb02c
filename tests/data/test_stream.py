import collections
import itertools
import time

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from deit_jax import data
from deit_jax.errors import InputError
from tests.data.conftest import permutation, picture


def _labels(batches, count):
    return [batch["label"] for batch in itertools.islice(batches, count)]


def _assert_equal(got, want):
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key])


@pytest.fixture
def folder(tmp_path, dataset_config):
    """Twelve JPEGs in two classes, as a train and an eval split."""
    for number in range(12):
        path = tmp_path / "train" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number, 40 + number, 60)).save(path)
    (tmp_path / "val").symlink_to(tmp_path / "train")
    dataset_config.root = str(tmp_path)
    return dataset_config


def test_every_epoch_is_another_permutation(counting, plain_config):
    batches = data.train_batches(
        counting(40), plain_config, image_size=4, batch_size=8, steps_per_epoch=5, seed=1
    )
    epochs = np.concatenate(_labels(batches, 15)).reshape(3, 40)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(40), (3, 1)))
    assert len({tuple(epoch) for epoch in epochs} | {tuple(range(40))}) == 4
    other = data.train_batches(
        counting(40), plain_config, image_size=4, batch_size=8, steps_per_epoch=5, seed=2
    )
    assert (np.concatenate(_labels(other, 5)) != epochs[0]).any()


def test_batches_hold_the_images_of_their_labels(counting, plain_config):
    batch = next(
        data.train_batches(
            counting(40), plain_config, image_size=4, batch_size=8, steps_per_epoch=5, seed=1
        )
    )
    assert batch["image"].shape == (8, 4, 4, 3)
    assert batch["image"].dtype == np.uint8
    assert batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["image"][:, 3, 1, 2], batch["label"])


def _global_batches(source, config, steps, *, processes=1, **sizes):
    """The batches of some steps, put together from every process's rows."""
    shares = [
        data.train_batches(
            source, config, **sizes,
            start_step=steps[0], process_index=index, process_count=processes,
        )
        for index in range(processes)
    ]  # fmt: skip
    return [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for parts in (list(map(next, shares)) for _ in steps)
    ]


# Views in a batch, and in an epoch, are not multiples of the repeats: an epoch is 32 of 36 views.
_SIZES = {"image_size": 16, "batch_size": 4, "group_size": 2, "steps_per_epoch": 8, "seed": 7}


def test_resuming_at_any_step_gives_the_same_bits(folder, input_config):
    input_config.repeats = 3
    source = data.open_source(folder, "train")
    whole = _global_batches(source, input_config, range(10), **_SIZES)
    for step in (3, 9):  # inside the first epoch and inside the second
        resumed = _global_batches(source, input_config, range(step, 10), **_SIZES)
        _assert_equal(resumed, whole[step:])
    assert len({image.tobytes() for batch in whole for image in batch["image"]}) == 40


def test_the_global_batch_does_not_depend_on_the_processes(folder, input_config):
    """Though they share the views of an image: whole images are decoded here, crops there."""
    input_config.repeats = 3
    source = data.open_source(folder, "train")
    alone = _global_batches(source, input_config, range(6, 9), **_SIZES)
    for processes in (2, 4):
        shared = _global_batches(source, input_config, range(6, 9), processes=processes, **_SIZES)
        _assert_equal(shared, alone)


def test_a_late_step_starts_at_once(counting, plain_config):
    step = 10**9  # which takes two minutes to count to
    sizes = {"batch_size": 8, "steps_per_epoch": 125, "seed": 0}
    started = time.process_time()
    batches = data.train_batches(
        counting(1000), plain_config, image_size=4, **sizes, start_step=step
    )
    image = next(batches)["image"]
    assert time.process_time() - started < 10
    want = permutation(1000, 0, step // 125)[step % 125 * 8 :][:8]
    np.testing.assert_array_equal(image[:, 0, 0, 0], want % 256)


@pytest.mark.parametrize("processes", [1, 2])
def test_an_image_is_fetched_once_for_all_its_views(counting, plain_config, processes):
    plain_config.repeats = 3
    sizes = {"batch_size": 8, "steps_per_epoch": 100, "seed": 0, "group_size": 4}
    fetched = collections.Counter()

    class Source(counting):
        def fetch(self, index):
            def count(index):
                fetched[int(index)] += 1
                return index

            return super().fetch(tf.ensure_shape(tf.numpy_function(count, [index], tf.int64), ()))

    source = Source(400)
    batches = data.train_batches(
        source, plain_config, image_size=4, process_index=0, process_count=processes, **sizes
    )
    used = [set(next(batches)["label"].tolist()) for _ in range(10)]
    needed = collections.Counter(itertools.chain(*used))
    assert needed.total() < 10 * 8 / processes
    assert fetched >= needed
    # tf.data works ahead, on images that stand in these batches and on later ones.
    for step in range(10, 100):
        names = data.example_ids(source, step=step, repeats=3, **sizes)[: 8 // processes]
        needed.update({int(name.removeprefix("counting:")) for name in names})
    assert fetched <= needed


def test_example_ids_name_the_rows_of_the_batch(counting, plain_config):
    plain_config.repeats = 3
    sizes = {"batch_size": 12, "steps_per_epoch": 3, "seed": 5, "group_size": 4}
    batches = data.train_batches(counting(40), plain_config, image_size=4, **sizes)
    for step, labels in enumerate(_labels(batches, 5)):
        ids = data.example_ids(counting(40), step=step, repeats=3, **sizes)
        assert ids == [f"counting:{label}" for label in labels]


def test_repeats_of_imagenet_on_eight_gpus(counting):
    """As measured on the reference's sampler: the first images of all GPUs in an epoch."""
    sizes = {"batch_size": 1024, "steps_per_epoch": 1251, "group_size": 128}
    ids = data.example_ids(counting(1_281_167), step=3 * 1251, seed=0, repeats=3, **sizes)
    first, fourth, seventh = ids[0], ids[3 * 128], ids[6 * 128]
    assert ids[::128] == [first] * 3 + [fourth] * 3 + [seventh] * 2
    assert ids[1] == seventh
    assert len({first, fourth, seventh}) == 3


@pytest.mark.parametrize(
    ("num_examples", "processes"), [(37, 1), (37, 3), (36, 3), (1, 2), (25, 2)]
)
def test_evaluation_sees_every_example_once(counting, plain_config, num_examples, processes):
    seen, lengths = [], set()
    for index in range(processes):
        batches = list(
            data.eval_batches(
                counting(num_examples),
                plain_config,
                image_size=4,
                batch_size=12,
                process_index=index,
                process_count=processes,
            )
        )
        lengths.add(len(batches))
        for batch in batches:
            assert batch["image"].shape == (12 // processes, 4, 4, 3)
            real = batch["mask"] == 1
            assert (batch["mask"][~real] == 0).all()
            assert not batch["image"][~real].any()
            np.testing.assert_array_equal(batch["image"][real][:, 0, 0, 0], batch["label"][real])
            seen += batch["label"][real].tolist()
    assert sorted(seen) == list(range(num_examples))
    assert lengths == {-(-num_examples // 12)}


def test_evaluation_does_not_depend_on_the_processes(folder, input_config):
    source = data.open_source(folder, "eval")
    sizes = {"image_size": 16, "batch_size": 8}
    alone = list(data.eval_batches(source, input_config, **sizes))
    halves = [
        data.eval_batches(source, input_config, **sizes, process_index=i, process_count=2)
        for i in range(2)
    ]
    for want, *parts in zip(alone, *halves, strict=True):
        for key in want:
            np.testing.assert_array_equal(np.concatenate([p[key] for p in parts]), want[key])


def test_a_label_outside_the_classes_is_named(counting, plain_config):
    source = counting(10, num_classes=6)
    with pytest.raises(
        InputError, match=r"counting:6 .*label outside the class range 0\.\.5:\] \[6\]"
    ):
        list(data.eval_batches(source, plain_config, image_size=4, batch_size=5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 3}, "group_size is 3"),
        ({"steps_per_epoch": 6}, r"6 batches of 8 does not fit 40 examples"),
        ({"steps_per_epoch": 0}, r"0 batches of 8"),
        ({"process_count": 3}, "batch_size is 8, expected a positive multiple of the 3 processes"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_at_the_call(counting, plain_config, change, message):
    arguments = {"image_size": 4, "batch_size": 8, "steps_per_epoch": 5, "seed": 1} | change
    with pytest.raises(InputError, match=message):
        data.train_batches(counting(40), plain_config, **arguments)
