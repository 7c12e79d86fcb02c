"""Broken images: named where they are errors, left out where they may be, never unnoticed."""

import errno
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from deit_jax import data
from deit_jax.data import transforms
from deit_jax.errors import InputError, TransientError
from tests.data.conftest import SIDE, CountingSource, encode, graph, permutation, plan_of


def _both(source, config, **fields):
    """Training and evaluation batches of the same plan."""
    plan = plan_of(config, **fields)
    return data.train_batches(source, plan), data.eval_batches(source, plan)


def _cut_short(path):
    path.write_bytes(path.read_bytes()[:-50])


_DAMAGES = {
    "cut short": _cut_short,
    "a PNG cut short": lambda path: path.write_bytes(encode(Image.open(path), "PNG")[:-100]),
    "cut in its header": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"not an image, but longer than any header is"),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", [pytest.param("cut short", marks=pytest.mark.slow), "gone"])
def test_an_unreadable_file_ends_training_and_evaluation(folder, input_config, damage):
    input_config.update({"scale": (1.0, 1.0), "ratio": (1.0, 1.0)})
    source = data.open_source(folder, "train")
    victim = Path(source.example_id(7))
    _DAMAGES[damage](victim)
    for batches in _both(source, input_config, image_size=SIDE, batch_size=4, steps_per_epoch=3):
        with pytest.raises(InputError) as caught:
            list(itertools.islice(batches, 3))
        assert str(victim) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not batches.skipped


def test_every_kind_of_damage_is_found_and_named(folder, input_config):
    input_config.update({"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "on_bad_image": "skip"})
    source = data.open_source(folder, "train")
    victims = [source.example_id(2 * number) for number in range(len(_DAMAGES))]
    for victim, damage in zip(victims, _DAMAGES.values(), strict=True):
        damage(Path(victim))
    for batches in _both(source, input_config, image_size=SIDE, batch_size=12):
        next(batches)
        assert sorted(batches.skipped) == sorted(victims)
        for reason in batches.skipped.values():
            assert reason
            assert not set("\n[{") & set(reason)
            assert "Iterator" not in reason


@pytest.mark.slow
def test_damage_below_the_crop_of_a_single_view_goes_unnoticed(folder, input_config):
    """And it does no harm; several views, or broken images to be skipped, need the whole image."""
    path = Path(data.open_source(folder, "train").example_id(0))
    intact = tf.constant(path.read_bytes())
    _cut_short(path)
    cut_short = tf.constant(path.read_bytes())
    input_config.update({"scale": (0.1, 0.2), "ratio": (1.0, 1.0)})
    transform = transforms.train_transform(input_config, image_size=SIDE)
    seeds = tf.constant([[0, number] for number in range(12)], tf.int64)
    read = 0
    for seed in seeds:
        want = transform(intact, seed[None])
        try:
            got = transform(cut_short, seed[None])
        except tf.errors.InvalidArgumentError:
            continue
        np.testing.assert_array_equal(got, want)
        read += 1
    assert 0 < read < len(seeds)
    with pytest.raises(tf.errors.InvalidArgumentError):
        transform(cut_short, seeds[:2])
    input_config.on_bad_image = "skip"
    transform = transforms.train_transform(input_config, image_size=SIDE)
    for seed in seeds:
        with pytest.raises(tf.errors.InvalidArgumentError):
            transform(cut_short, seed[None])


class BrokenSource(CountingSource):
    """A counting source some of whose examples cannot be read."""

    def __init__(self, num_examples, broken, num_classes=None):
        super().__init__(num_examples, num_classes)
        self._broken = tf.constant(sorted(broken), tf.int64)

    def fetch(self, index):
        readable = tf.debugging.Assert(tf.reduce_all(index != self._broken), ["broken"])
        with tf.control_dependencies([readable]):
            return super().fetch(tf.identity(index))


def _labels(source, config, steps, *, processes=1, **sizes):
    """The labels of the global batches of some steps, and every process's skipped examples."""
    sizes["process_count"] = processes
    plans = [plan_of(config, process_index=index, **sizes) for index in range(processes)]
    shares = [data.train_batches(source, plan, start_step=steps[0]) for plan in plans]
    batches = [np.concatenate([next(share)["label"] for share in shares]) for _ in steps]
    return batches, [share.skipped for share in shares]


def _expected(num_examples, broken, step, *, batch_size, steps_per_epoch, repeats, seed, groups):
    """Labels of a batch, and what is met: for a broken image the next one of the epoch's order.

    Row j of group g is view g + groups·j of the batch; the views of an epoch are its order with
    each image repeated in place.
    """
    epoch, place = divmod(step, steps_per_epoch)
    order = permutation(num_examples, seed, epoch)
    labels, met = [], set()
    for group, row in itertools.product(range(groups), range(batch_size // groups)):
        following = np.roll(order, -((place * batch_size + group + groups * row) // repeats))
        labels.append(next(image for image in following if image not in broken))
        met |= {
            f"counting:{image}" for image in itertools.takewhile(broken.__contains__, following)
        }
    return labels, met


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_examples", "broken", "steps", "sizes", "groups"),
    [
        (21, {2, 3, 11}, range(2, 6), {"batch_size": 8, "steps_per_epoch": 4, "repeats": 3}, 4),
        (21, {2, 3, 11}, range(1, 4), {"batch_size": 8, "steps_per_epoch": 2, "repeats": 1}, 1),
        # The second batch meets one example in two places at once, its own and another's.
        (3, {0, 1}, range(2), {"batch_size": 2, "steps_per_epoch": 1, "repeats": 1}, 1),
    ],
)
def test_the_next_readable_example_takes_the_place(
    plain_config, num_examples, broken, steps, sizes, groups
):
    sizes["seed"] = 1
    want, met = zip(
        *(_expected(num_examples, broken, step, groups=groups, **sizes) for step in steps),
        strict=True,
    )
    plain_config.update({"on_bad_image": "skip", "repeats": sizes.pop("repeats")})
    sizes["group_size"] = sizes["batch_size"] // groups
    source = BrokenSource(num_examples, broken)

    whole, (skipped,) = _labels(source, plain_config, steps, **sizes)
    np.testing.assert_array_equal(whole, want)
    assert skipped.keys() == set.union(*met) != set()
    assert all("broken" in reason for reason in skipped.values())
    if groups > 1:
        halves, _ = _labels(source, plain_config, steps, processes=2, **sizes)
        np.testing.assert_array_equal(halves, whole)
    if num_examples > 3:
        resumed, _ = _labels(source, plain_config, steps[2:], **sizes)  # which knows of none
        np.testing.assert_array_equal(resumed, whole[2:])


@pytest.mark.slow
def test_only_the_views_of_broken_files_change(folder, input_config):
    """A view keeps its crop and its flip; which file it shows is all that changes."""
    source = data.open_source(folder, "train")
    input_config.update({"repeats": 3, "scale": (0.5, 0.5), "ratio": (1.0, 1.0)})
    sizes = {"image_size": SIDE, "batch_size": 4, "steps_per_epoch": 3, "seed": 3}
    plan = plan_of(input_config, **sizes)
    shown = [name for step in range(6) for name in data.example_ids(source, plan, step)]

    def images():
        batches = data.train_batches(source, plan_of(input_config, **sizes))
        return np.concatenate([next(batches)["image"] for _ in range(6)]), batches.skipped

    intact, _ = images()
    broken = {shown[3], shown[20]}
    for name in broken:
        _cut_short(Path(name))
    input_config.on_bad_image = "skip"
    mended, skipped = images()
    assert skipped.keys() == broken
    transform = transforms.train_transform(input_config, image_size=SIDE)
    transform = graph(transform, (tf.string, ()), (tf.int64, (1, 2)))
    others = {source.example_id(index) for index in range(12)} - broken
    for position, name in enumerate(shown):
        if name not in broken:
            np.testing.assert_array_equal(mended[position], intact[position])
        else:
            seeds = tf.constant([[plan.seed, position]], tf.int64)
            views = [transform(tf.io.read_file(other), seeds)[0].numpy() for other in others]
            assert any((mended[position] == view).all() for view in views)


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_masks_broken_images_out(plain_config, processes):
    plain_config.on_bad_image = "skip"
    broken = {0, 5, 6, 16}
    seen, skipped = [], {}
    for index in range(processes):
        plan = plan_of(plain_config, process_index=index, process_count=processes)
        batches = data.eval_batches(BrokenSource(17, broken), plan)
        for number, batch in enumerate(batches):
            first = 8 * number + plan.first_row
            real = batch["mask"] == 1
            want = [i not in broken and i < 17 for i in range(first, first + plan.local_rows)]
            np.testing.assert_array_equal(real, want)
            np.testing.assert_array_equal(batch["label"][real], first + np.flatnonzero(real))
            np.testing.assert_array_equal(batch["image"][real][:, 0, 0, 0], batch["label"][real])
            assert not batch["image"][~real].any()
            seen += batch["label"][real].tolist()
        skipped |= batches.skipped
    assert sorted(seen) == sorted(set(range(17)) - broken)
    assert skipped.keys() == {f"counting:{number}" for number in broken}


@pytest.mark.slow
@pytest.mark.parametrize("on_bad_image", ["error", "skip"])
def test_a_label_outside_the_classes_is_never_skipped(plain_config, on_bad_image):
    plain_config.on_bad_image = on_bad_image
    broken = {1} if on_bad_image == "skip" else ()
    for batches in _both(BrokenSource(10, broken, num_classes=6), plain_config, batch_size=10):
        with pytest.raises(InputError, match=r"counting:([6-9]).* 0\.\.5:\] \[\1\]"):
            next(batches)


@pytest.mark.slow
@pytest.mark.parametrize(("on_bad_image", "number"), [("error", errno.ESTALE), ("skip", errno.EIO)])
def test_storage_that_fails_is_no_broken_image(plain_config, on_bad_image, number):
    """Neither skipped, which would change what is trained on, nor called a mistake."""

    def stale(index):
        if index == 1:
            raise OSError(number, os.strerror(number), "1.jpg")
        return index

    class StaleSource(CountingSource):
        def fetch(self, index):
            return super().fetch(tf.ensure_shape(tf.py_function(stale, [index], tf.int64), ()))

    plain_config.on_bad_image = on_bad_image
    for batches in _both(StaleSource(6), plain_config, batch_size=6):
        with pytest.raises(TransientError, match=r"counting:1 .*1\.jpg"):
            next(batches)
        assert not batches.skipped


@pytest.mark.slow
def test_a_split_without_a_readable_image_is_an_error(plain_config):
    plain_config.on_bad_image = "skip"
    for batches in _both(BrokenSource(3, range(3)), plain_config, batch_size=2):
        with pytest.raises(InputError, match="none of its 3 images"):
            list(itertools.islice(batches, 4))
        assert len(batches.skipped) == 3
