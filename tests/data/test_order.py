"""The order of the training stream against the reference's sampler, written anew in NumPy."""

import numpy as np
import pytest
import tensorflow as tf

from deit_jax import data
from deit_jax.data.order import Order
from tests.data.conftest import CountingSource, permutation, plan_of


def _sampler(order, repeats, gpus, samples):
    """What each GPU is given: every image repeated in place, and every W-th of the views.

    [W, samples], after the reference's RASampler, whose padding and cut to a multiple of 256 the
    number of whole batches takes the place of.
    """
    views = np.repeat(order, repeats)
    return np.stack([views[rank::gpus][:samples] for rank in range(gpus)])


@pytest.mark.parametrize(
    ("num_examples", "repeats", "gpus", "local", "steps"),
    [
        (40, 3, 4, 3, 3),  # 36 views of 12 images
        (40, 3, 1, 8, 5),  # neither the batch nor the epoch is a multiple of 3
        (40, 3, 2, 5, 11),
        (40, 3, 8, 2, 7),
        (40, 3, 3, 4, 10),  # every view of every image
        (37, 1, 2, 4, 4),
        (40, 1, 4, 2, 5),
        (1, 3, 3, 1, 1),
    ],
)
def test_batches_are_dealt_as_the_reference_sampler_does(
    input_config, num_examples, repeats, gpus, local, steps
):
    input_config.repeats = repeats
    sizes = {"batch_size": gpus * local, "steps_per_epoch": steps, "group_size": local}
    source, plan = CountingSource(num_examples), plan_of(input_config, seed=9, **sizes)
    for epoch in (0, 1, 50_000):
        batches = [data.example_ids(source, plan, epoch * steps + step) for step in range(steps)]
        labels = np.array([[int(name.partition(":")[2]) for name in names] for names in batches])
        order = permutation(num_examples, 9, epoch)
        want = _sampler(order, repeats, gpus, steps * local).reshape(gpus, steps, local)
        np.testing.assert_array_equal(labels.reshape(steps, gpus, local), want.swapaxes(0, 1))

        drawn, rest = divmod(steps * gpus * local, repeats)
        counts = np.bincount(labels.ravel(), minlength=num_examples)
        assert sorted(counts[counts > 0]) == [rest] * (rest > 0) + [repeats] * drawn


def test_repeats_of_imagenet_on_eight_gpus(input_config):
    """As measured on the reference's sampler: the first images of all GPUs in an epoch."""
    input_config.repeats = 3
    plan = plan_of(input_config, batch_size=1024, steps_per_epoch=1251, group_size=128)
    ids = data.example_ids(CountingSource(1_281_167), plan, 3 * 1251)
    first, fourth, seventh = ids[0], ids[3 * 128], ids[6 * 128]
    assert ids[::128] == [first] * 3 + [fourth] * 3 + [seventh] * 2
    assert ids[1] == seventh
    assert len({first, fourth, seventh}) == 3


@pytest.mark.parametrize("num_examples", [100, 50_000])
def test_no_two_epochs_or_seeds_have_the_same_order(input_config, num_examples):
    """The cipher alone repeats itself after 256 epochs, and 256 seeds."""

    def first(seed, epoch):
        plan = plan_of(input_config, seed=seed, batch_size=20, steps_per_epoch=5)
        return tuple(data.example_ids(CountingSource(num_examples), plan, 5 * epoch))

    numbers = (0, 1, 256, 257, 512, 65_536, 2**24)
    orders = [first(seed, 0) for seed in numbers] + [first(0, epoch) for epoch in numbers[1:]]
    orders.append(first(256, 256))
    assert len(set(orders)) == len(orders)


def test_all_images_are_seen_as_often_over_many_epochs(input_config):
    """Of three repeats an epoch has a third of the images: over 1,500, another third each."""
    input_config.repeats, examples, epochs = 3, 20, 1500
    plan = plan_of(input_config, batch_size=20, steps_per_epoch=1)
    order = Order(plan, examples)
    seen = tf.function(lambda step: order.index(order.slots(step)))
    counts = np.zeros(examples)
    for epoch in range(epochs):
        np.add.at(counts, seen(tf.constant(epoch, tf.int64)).numpy(), 1)
    share = counts.sum() / examples / epochs
    assert np.std(counts) < 1.5 * np.sqrt(epochs * share * (1 - share))
