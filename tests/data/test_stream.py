"""Batches: the right rows, whatever the first step and the number of processes."""

import collections
import errno
import itertools
import threading
import time

import numpy as np
import pytest
import tensorflow as tf

from deit_jax import data
from deit_jax.errors import InputError, TransientError
from tests.data.conftest import CountingSource, permutation, plan_of


class AheadSource(CountingSource):
    """The same examples, read in Python."""

    is_read = True

    def read(self, index):
        return bytes([index]) * 48

    def parse(self, data, index):
        return tf.reshape(tf.io.decode_raw(data, tf.uint8), (4, 4, 3)), tf.cast(index, tf.int32)


def _assert_equal(got, want):
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key])


def test_every_epoch_is_another_permutation_of_the_images_and_their_labels(plain_config):
    def epochs(seed, count):
        plan = plan_of(plain_config, steps_per_epoch=5, seed=seed)
        batches = list(itertools.islice(data.train_batches(CountingSource(40), plan), 5 * count))
        for batch in batches:
            assert (batch["image"].dtype, batch["label"].dtype) == (np.uint8, np.int32)
            image = np.broadcast_to(batch["label"][:, None, None, None], (8, 4, 4, 3))
            np.testing.assert_array_equal(batch["image"], image)
        return np.concatenate([batch["label"] for batch in batches]).reshape(count, 40)

    several = epochs(1, 3)
    np.testing.assert_array_equal(np.sort(several), np.tile(np.arange(40), (3, 1)))
    assert len({tuple(epoch) for epoch in several} | {tuple(range(40))}) == 4
    assert (epochs(2, 1) != several[0]).any()


def _joined(parts):
    """The global batch of the processes' parts."""
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _global_batches(source, config, steps, *, processes=1):
    """The batches of some steps, put together from every process's rows.

    Views in a batch, and in an epoch, are not multiples of the repeats: an epoch is 32 of 36 views.
    """
    sizes = {"image_size": 16, "batch_size": 4, "group_size": 2, "steps_per_epoch": 8, "seed": 7}
    sizes["process_count"] = processes
    plans = [plan_of(config, process_index=index, **sizes) for index in range(processes)]
    shares = [data.train_batches(source, plan, start_step=steps[0]) for plan in plans]
    return [_joined(list(map(next, shares))) for _ in steps]


@pytest.mark.slow
def test_batches_depend_neither_on_the_first_step_nor_on_the_processes(folder, input_config):
    """Processes may share the views of an image: whole images are decoded here, crops there."""
    input_config.repeats = 3
    source = data.open_source(folder, "train")
    whole = _global_batches(source, input_config, range(10))
    assert len({image.tobytes() for batch in whole for image in batch["image"]}) == 40
    for step in (3, 9):  # inside the first epoch and inside the second
        _assert_equal(_global_batches(source, input_config, range(step, 10)), whole[step:])
    for processes in (2, 4):
        shared = _global_batches(source, input_config, range(6, 9), processes=processes)
        _assert_equal(shared, whole[6:9])


def test_a_late_step_starts_at_once(plain_config):
    step = 10**9  # which takes two minutes to count to
    started = time.process_time()
    plan = plan_of(plain_config, steps_per_epoch=125)
    image = next(data.train_batches(CountingSource(1000), plan, start_step=step))["image"]
    assert time.process_time() - started < 10
    want = permutation(1000, 0, step // 125)[step % 125 * 8 :][:8]
    np.testing.assert_array_equal(image[:, 0, 0, 0], want % 256)


@pytest.mark.parametrize("processes", [1, 2])
def test_an_image_is_fetched_once_for_all_its_views(plain_config, processes):
    plain_config.repeats = 3
    plan = plan_of(plain_config, steps_per_epoch=100, group_size=4, process_count=processes)
    fetched = collections.Counter()

    class Source(CountingSource):
        def fetch(self, index):
            def count(index):
                fetched[int(index)] += 1
                return index

            return super().fetch(tf.ensure_shape(tf.numpy_function(count, [index], tf.int64), ()))

    source = Source(400)
    batches = data.train_batches(source, plan)
    used = [set(next(batches)["label"].tolist()) for _ in range(10)]
    needed = collections.Counter(itertools.chain(*used))
    assert needed.total() < 10 * plan.local_rows
    assert fetched >= needed
    # tf.data works ahead, on images that stand in these batches and on later ones.
    for step in range(10, 100):
        names = data.example_ids(source, plan, step)[: plan.local_rows]
        needed.update({int(name.removeprefix("counting:")) for name in names})
    assert fetched <= needed


@pytest.mark.parametrize("batches", [data.train_batches, data.eval_batches])
def test_reads_overlap_by_their_own_number(plain_config, batches):
    """The first read waits until seven others are under way, on however few processors."""
    together, met = threading.Barrier(8), threading.Event()

    class Source(AheadSource):
        def read(self, index):
            if not met.is_set():
                together.wait(timeout=60)
                met.set()
            return super().read(index)

    def taken(readers):
        plain_config.read_threads = readers
        stream = batches(Source(37), plan_of(plain_config, steps_per_epoch=4))
        return list(itertools.islice(stream, 5))

    _assert_equal(taken(8), taken(0))


@pytest.mark.parametrize("threads", [1, 4])  # with one, 37 groups follow one another
@pytest.mark.parametrize("fails", [1, 99])
def test_a_read_ahead_that_fails(plain_config, fails, threads):
    """One that fails once is read again; one that goes on failing is named."""
    attempts = collections.Counter()

    class Source(AheadSource):
        def read(self, index):
            attempts[index] += 1
            if index == 5 and attempts[index] <= fails:
                raise OSError(errno.EIO, "no answer")
            return super().read(index)

        def fetch(self, index):
            data = tf.numpy_function(lambda index: self.read(int(index)), [index], tf.string)
            return self.parse(data, index)

    plain_config.read_threads = threads
    batches = data.eval_batches(Source(37), plan_of(plain_config))
    if fails == 1:
        _assert_equal(list(batches), list(data.eval_batches(Source(37), plan_of(plain_config))))
    else:
        with pytest.raises((InputError, TransientError), match=r"counting:5 cannot be .*no answer"):
            list(batches)


def test_a_bug_in_reading_ahead_is_not_taken_for_a_bad_image(plain_config):
    class Source(AheadSource):
        def read(self, index):
            return super().read(index.no_such_attribute)

    plain_config.read_threads = 4
    with pytest.raises(tf.errors.OpError, match="no_such_attribute"):
        list(data.eval_batches(Source(37), plan_of(plain_config)))


@pytest.mark.parametrize("group_size", [4, 12])
def test_example_ids_name_the_rows_of_the_batch(plain_config, group_size):
    plain_config.repeats = 3
    plan = plan_of(plain_config, batch_size=12, steps_per_epoch=3, seed=5, group_size=group_size)
    source = CountingSource(40)
    for step, batch in zip(range(5), data.train_batches(source, plan), strict=False):
        names = [f"counting:{label}" for label in batch["label"]]
        assert data.example_ids(source, plan, step) == names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_examples", "processes"), [(37, 1), (37, 3), (36, 3), (1, 2), (25, 2)]
)
def test_evaluation_sees_every_example_once(plain_config, num_examples, processes):
    seen, lengths = [], set()
    for index in range(processes):
        plan = plan_of(plain_config, batch_size=12, process_index=index, process_count=processes)
        batches = list(data.eval_batches(CountingSource(num_examples), plan))
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
    alone, *halves = (
        data.eval_batches(source, plan_of(input_config, image_size=16, **processes))
        for processes in ({}, *({"process_index": i, "process_count": 2} for i in range(2)))
    )
    _assert_equal([_joined(parts) for parts in zip(*halves, strict=True)], list(alone))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 3}, "group_size is 3"),
        ({"steps_per_epoch": 6}, "6 batches of 8"),
        ({"steps_per_epoch": 0}, "0 batches of 8"),
        ({"process_count": 3}, "batch_size is 8.* 3 processes"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_at_the_call(plain_config, change, message):
    with pytest.raises(InputError, match=message):
        data.train_batches(
            CountingSource(40), plan_of(plain_config, **{"steps_per_epoch": 5} | change)
        )
