import itertools
import time

import numpy as np
import pytest
from PIL import Image

from deit_jax import data
from deit_jax.errors import InputError
from tests.data.conftest import picture


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


def test_repeats_are_dealt_to_groups_as_the_reference_sampler_does(counting, plain_config):
    # 40 images, 3 repeats, 4 GPUs with 3 images each: 36 samples an epoch, 12 distinct images.
    plain_config.repeats = 3
    gpus, local, steps = 4, 3, 3
    batches = data.train_batches(
        counting(40),
        plain_config,
        image_size=4,
        batch_size=gpus * local,
        steps_per_epoch=steps,
        seed=0,
        group_size=local,
    )
    for _ in range(2):
        labels = np.stack(_labels(batches, steps)).reshape(steps, gpus, local)
        for batch in labels:
            assert all(len(set(group)) == local for group in batch)
        counts = np.bincount(labels.ravel(), minlength=40)
        assert sorted(counts)[-12:] == [3] * 12
        assert counts.sum() == 36
        # The sampler: repeat each index in place, give rank r the places r, r+W, …, cut to batches.
        drawn = list(dict.fromkeys(labels[:, :, :].transpose(0, 2, 1).ravel()))
        repeated = np.repeat(drawn, 3)
        want = np.stack([repeated[rank::gpus].reshape(steps, local) for rank in range(gpus)], 1)
        np.testing.assert_array_equal(labels, want)


def test_group_size_only_reorders_the_rows_of_a_batch(counting, plain_config):
    def labels(group_size):
        return _labels(
            data.train_batches(
                counting(40),
                plain_config,
                image_size=4,
                batch_size=8,
                steps_per_epoch=5,
                seed=1,
                group_size=group_size,
            ),
            5,
        )

    plain, whole, halves = labels(None), labels(8), labels(4)
    np.testing.assert_array_equal(plain, whole)
    np.testing.assert_array_equal(np.sort(plain), np.sort(halves))
    np.testing.assert_array_equal(halves[0], plain[0].reshape(4, 2).T.ravel())


def test_resuming_at_any_step_gives_the_same_bits(folder, input_config):
    source = data.open_source(folder, "train")

    def start(step):
        return data.train_batches(
            source,
            input_config,
            image_size=16,
            batch_size=4,
            steps_per_epoch=3,
            seed=7,
            start_step=step,
        )

    whole = list(itertools.islice(start(0), 8))
    _assert_equal(list(itertools.islice(start(0), 8)), whole)
    for step in (1, 5):  # inside the first epoch and inside the second
        _assert_equal(list(itertools.islice(start(step), 8 - step)), whole[step:])
    assert len({image.tobytes() for batch in whole for image in batch["image"]}) == 32


def test_the_global_batch_does_not_depend_on_the_processes(folder, input_config):
    input_config.train_crop = "small"
    source = data.open_source(folder, "train")

    def run(process_count):
        shares = [
            itertools.islice(
                data.train_batches(
                    source,
                    input_config,
                    image_size=16,
                    batch_size=4,
                    steps_per_epoch=3,
                    seed=7,
                    start_step=2,
                    group_size=2,
                    process_index=index,
                    process_count=process_count,
                ),
                3,
            )
            for index in range(process_count)
        ]
        return [
            {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            for parts in zip(*shares, strict=True)
        ]

    alone = run(1)
    _assert_equal(run(2), alone)
    _assert_equal(run(4), alone)


def test_a_late_step_starts_at_once(counting, plain_config):
    started = time.monotonic()
    batches = data.train_batches(
        counting(1000),
        plain_config,
        image_size=4,
        batch_size=8,
        steps_per_epoch=125,
        seed=0,
        start_step=10_000_000,
    )
    assert len(next(batches)["label"]) == 8
    assert time.monotonic() - started < 10


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
