"""RandAugment against timm's own, on PIL images, with the same draws and with draws of its own."""

import functools
import random

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance
from scipy import stats

from deit_jax.config.randaugment_policy import OPERATIONS, Policy, parse_policy
from deit_jax.data import randaugment, transforms
from deit_jax.data.draws import fold
from deit_jax.data.pillow import tone
from tests.data.conftest import check_stateless, drawn, picture, uncorrelated
from tests.oracles.torchvision_ops import import_torchvision

import_torchvision()

from timm.data import auto_augment as timm_augment  # noqa: E402

FILL = (124, 116, 104)
DEIT = "rand-m9-mstd0.5-inc1"
GEOMETRY = {"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"}
RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def _timm(text, interpolation="bicubic"):
    hparams = {"img_mean": FILL, "interpolation": RESAMPLE[interpolation]}
    return timm_augment.rand_augment_transform(text, hparams)


@functools.cache
def _ours(text, interpolation="bicubic"):
    """(image, *draws) → image, traced once per side."""
    policy = parse_policy(text)

    def function(image, *draws):
        how = {"policy": policy, "interpolation": interpolation, "fill": FILL}
        return randaugment.apply(image, randaugment.Draws(*draws), **how)

    function = tf.function(function, autograph=False)
    kinds = (tf.uint8, tf.int32, tf.bool, tf.float64, tf.bool)
    return lambda *inputs: function(*map(tf.constant, inputs, kinds)).numpy()


def _timm_operation(operation, image, level, negative, monkeypatch):
    """One operation of timm at exactly this level; 0 bits, which Pillow now refuses, give black."""
    monkeypatch.setattr(timm_augment, "_randomly_negate", lambda v: -v if negative else v)
    arguments = operation.level_fn(level, operation.hparams) if operation.level_fn else ()
    if operation.name.startswith("Posterize") and arguments[0] <= 0:
        return np.zeros_like(image)
    return np.asarray(operation.aug_fn(Image.fromarray(image), *arguments, **operation.kwargs))


def _compare(text, interpolation, images, levels, names, monkeypatch):
    """Checks operations at all levels and both signs; returns the shares of differing pixels."""
    ours, theirs = _ours(text.replace("rand", "rand-n1"), interpolation), _timm(text, interpolation)
    shares = {}
    for name in names:
        number = OPERATIONS.index(name)
        operation = theirs.ops[number]
        assert operation.name.removesuffix("Rel").removesuffix("Increasing") == name
        for level in levels:
            for negative in (False, True):
                different = []
                for image in images:
                    got = ours(image, [number], [True], [level], [negative])
                    want = _timm_operation(operation, image, level, negative, monkeypatch)
                    difference = np.abs(got.astype(int) - want).max(axis=-1)
                    assert difference.max() <= (name in GEOMETRY), (name, level, negative)
                    different.append((difference > 0).mean())
                shares[name, level, negative] = np.mean(different)
    return shares


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_equals_timms(photographs, name, monkeypatch):
    """Bit for bit; in the geometry a pixel in a thousand may be a level off (none is, mostly)."""
    for images, levels in (
        (photographs(96, 16), (0.0, 2.5, 7.3456, 9.0, 10.0)),
        (photographs(224, 4), (5.4321, 9.4)),
    ):
        shares = _compare(DEIT, "bicubic", images, levels, [name], monkeypatch)
        assert max(shares.values()) < 1e-3
        assert np.mean(list(shares.values())) < 1e-4


_USUAL, _ABOVE_TEN = (0.0, 2.4, 4.9, 7.5, 9.21, 10.0), (11.0, 20.0, 24.6, 30.0)
_MAPPED = ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")


@pytest.mark.parametrize(
    ("text", "interpolation", "levels", "names"),
    [
        ("rand-m9-mstd0.5", "bicubic", _USUAL, _MAPPED),  # other maps from level to argument
        (DEIT, "bilinear", _USUAL, sorted(GEOMETRY)),
        # Right angles, everything outside, the bounds of all maps.
        ("rand-m9-mmax30-inc1", "bicubic", _ABOVE_TEN, OPERATIONS),
        ("rand-m9-mmax30", "bicubic", _ABOVE_TEN, OPERATIONS),
    ],
)
def test_the_other_list_interpolation_and_levels(
    photographs, text, interpolation, levels, names, monkeypatch
):
    images = photographs(96, 2 if levels is _ABOVE_TEN else 4)
    shares = _compare(text, interpolation, images, levels, names, monkeypatch)
    assert max(shares.values()) < 1e-3


@pytest.mark.slow
def test_images_at_the_edge_of_the_definitions(monkeypatch):
    """Tables of a single value, of two, of a few pixels; saturation in both directions."""
    side = 24
    ramp = np.arange(side * side, dtype=int).reshape(side, side, 1) * 255 // side**2
    one_pixel = np.full((side, side, 3), 77, np.uint8)
    one_pixel[3, 5] = 200  # fewer than 255 pixels: Equalize has step 0
    two_values = np.where(np.arange(side)[:, None, None] < 15, 100, (101, 180, 99))
    images = [
        np.zeros((side, side, 3)),
        np.full((side, side, 3), 255),
        np.full((side, side, 3), (0, 77, 255)),
        one_pixel,
        np.broadcast_to(two_values, (side, side, 3)),
        np.concatenate([ramp, 255 - ramp, ramp // 2 + 30], axis=-1),
        np.random.default_rng(0).integers(0, 256, (side, side, 3)),
        np.random.default_rng(1).integers(100, 103, (side, side, 3)),
    ]
    images = [np.ascontiguousarray(image, np.uint8) for image in images]
    shares = _compare(DEIT, "bicubic", images, (0.0, 9.3, 10.0), OPERATIONS, monkeypatch)
    assert max(shares.values()) < 1e-3


def test_sharpness_keeps_the_border():
    for side in (1, 2, 3):
        image = picture(side, side, side)
        want = ImageEnhance.Sharpness(Image.fromarray(image)).enhance(1.9)
        np.testing.assert_array_equal(tone.sharpness(image, tf.constant(1.9)), want)


class _Recorder:
    """Stands for the module `random` inside timm and notes what it returned."""

    def __init__(self, seed):
        self.source = random.Random(seed)
        self.operations = []  # (index, [numbers])

    def random(self):
        return self._note(self.source.random())

    def gauss(self, mean, deviation):
        return self._note(self.source.gauss(mean, deviation))

    def uniform(self, low, high):
        return self._note(self.source.uniform(low, high))

    def _note(self, number):
        self.operations[-1][1].append(number)
        return number

    def watch(self, transform):
        """Makes the transform's operations announce themselves."""

        def announced(index, operation):
            def call(image):
                self.operations.append((index, []))
                return operation(image)

            return call

        transform.ops = [announced(*pair) for pair in enumerate(transform.ops)]

    def draws(self, policy):
        """The recorded operations as Draws, each as a list, and whether each had a sign."""
        rows, signed = [], []
        for index, numbers in self.operations:
            applied = numbers[0] <= policy.probability
            level = min(max(numbers[1], 0.0), 10.0) if applied else 0.0
            signed.append(len(numbers) > 2)
            rows.append((index, applied, level, signed[-1] and numbers[2] > 0.5))
        return randaugment.Draws(*map(list, zip(*rows, strict=True))), signed


def test_whole_policy_with_timms_draws(photographs, monkeypatch):
    policy, ours, theirs = parse_policy(DEIT), _ours(DEIT), _timm(DEIT)
    recorder = _Recorder(0)
    monkeypatch.setattr(timm_augment, "random", recorder)
    recorder.watch(theirs)
    np.random.seed(0)  # noqa: NPY002
    differences, compared, changed, images = [], 0, 0, photographs(96, 16)
    for number in range(240):
        image = images[number % 16]
        recorder.operations = []
        try:
            want = np.asarray(theirs(Image.fromarray(image)), int)
        except ValueError as error:  # 0 bits in Pillow 13
            assert "bits" in str(error)  # noqa: PT017
            continue
        draws, _ = recorder.draws(policy)
        got = ours(image, *draws)
        differences.append(np.abs(got - want).mean())
        compared += 1
        changed += (got != image).any()
    assert compared > 230
    assert 0.6 * compared < changed < 0.85 * compared  # a quarter of the images gets no operation
    assert np.mean(differences) < 0.01
    assert np.max(differences) < 0.5


def _drawn(policy, count):
    return randaugment.Draws(*drawn(lambda seed: tuple(randaugment.draw(seed, policy)), count))


def test_statistics_are_timms(monkeypatch):
    count, policy, theirs = 20_000, parse_policy(DEIT), _timm(DEIT)
    ours = _drawn(policy, count)
    for operation in theirs.ops:
        operation.aug_fn = lambda image, *arguments, **how: image
    recorder = _Recorder(1)
    monkeypatch.setattr(timm_augment, "random", recorder)
    recorder.watch(theirs)
    np.random.seed(1)  # noqa: NPY002
    for _ in range(count):
        theirs(None)
    timms, signed = recorder.draws(policy)
    timms = randaugment.Draws(*(np.reshape(x, (count, 2)) for x in timms))
    signed = np.reshape(signed, (count, 2))

    def same_counts(a, b, size):
        table = [np.bincount(x.ravel(), minlength=size) for x in (a, b)]
        assert stats.chi2_contingency(table).pvalue > 1e-3, table

    # Pairs of operations: uniform, independent, with replacement.
    pairs = [draws.operation.astype(int) @ (15, 1) for draws in (ours, timms)]
    same_counts(*pairs, 225)
    assert stats.chisquare(np.bincount(pairs[0], minlength=225)).pvalue > 1e-3
    same_counts(ours.applied.astype(int) @ (2, 1), timms.applied.astype(int) @ (2, 1), 4)
    # Levels, of the operations that timm applied: clipped at 10, never below 0.
    levels = [draws.level[draws.applied] for draws in (ours, timms)]
    assert stats.ks_2samp(*levels).pvalue > 1e-3
    assert max(map(np.max, levels)) == 10.0
    full = [(level == 10.0).mean() for level in levels]
    assert abs(full[0] - full[1]) < 4.5 * np.sqrt(2 * 0.0228 / levels[1].size)
    # Signs, of those that have one.
    same_counts(ours.negative.astype(int)[signed], timms.negative.astype(int)[signed], 2)
    assert 0.28 < signed.mean() < 0.32  # 9 of 15 are signed, and half of them applied
    # Nothing is drawn from the same numbers as something else, or as the other layer.
    assert uncorrelated(np.concatenate([np.asarray(x, float) for x in ours], axis=1).T)


def test_statistics_of_other_policies():
    count = 4000
    plain = _drawn(parse_policy("rand-m7-n3-p0.2"), count)
    assert plain.operation.shape == (count, 3)
    assert (plain.level == 7.0).all()
    assert abs(plain.applied.mean() - 0.2) < 4.5 * np.sqrt(0.16 / count / 3)
    uniform = _drawn(parse_policy("rand-m6-mstd101"), count)
    assert stats.kstest(uniform.level.ravel() / 6.0, "uniform").pvalue > 1e-3
    assert _drawn(parse_policy("rand-p1"), 100).applied.all()
    assert not _drawn(parse_policy("rand-p0"), 100).applied.any()
    wide = _drawn(parse_policy("rand-m9-mstd20-mmax15"), count)
    assert (wide.level.min(), wide.level.max()) == (0.0, 15.0)


@pytest.mark.slow
def test_the_policy_is_a_function_of_the_seed(photographs):
    (image,) = photographs(96, 1)
    check_stateless(lambda seed: _augmented(tf.constant(image), seed, DEIT), count=64, distinct=35)


def _augmented(image, seed, text):
    draws = randaugment.draw(seed, parse_policy(text))
    how = {"policy": parse_policy(text), "interpolation": "bicubic", "fill": FILL}
    return randaugment.apply(image, draws, **how)


@pytest.mark.slow
def test_training_applies_the_policy_after_crop_and_flip(jpegs, input_config):
    data = tf.constant(jpegs[0].read_bytes())
    seeds = tf.constant([[1, i] for i in range(3)], tf.int64)
    plain = transforms.train_transform(input_config, image_size=48)
    input_config.auto_augment = "rand-m9-mstd0.5-inc1-n4-p1"
    augmented = transforms.train_transform(input_config, image_size=48)
    for seed, image, got in zip(seeds, plain(data, seeds), augmented(data, seeds), strict=True):
        want = _augmented(image, fold(seed, 2), input_config.auto_augment)
        np.testing.assert_array_equal(got, want)
        assert (got != image).numpy().any()


@pytest.mark.slow
def test_training_passes_interpolation_and_mean_on(jpegs, input_config, monkeypatch):
    seen = []
    monkeypatch.setattr(randaugment, "apply", lambda image, _, **how: seen.append(how) or image)
    for mean, interpolation in ((input_config.mean, "bicubic"), ((0.5, 1.2, -0.1), "bilinear")):
        input_config.update(
            {"auto_augment": DEIT, "mean": mean, "interpolation": interpolation, "pad": 0}
        )
        transforms.train_transform(input_config, image_size=8)(
            tf.constant(jpegs[0].read_bytes()), tf.constant([[1, 2]], tf.int64)
        )
    assert [how["fill"] for how in seen] == [FILL, (128, 255, 0)]
    assert [how["interpolation"] for how in seen] == ["bicubic", "bilinear"]
    assert {how["policy"] for how in seen} == {parse_policy(DEIT)}


@pytest.mark.parametrize(
    "text",
    ["rand", DEIT, "rand-m9-n3-p0.25", "rand-inc0-m4", "rand-inc2-mstd1.-mmax12", "rand-mstd101"],
)
def test_policies_mean_what_they_mean_to_timm(text):
    policy, theirs = parse_policy(text), _timm(text)
    operation = theirs.ops[4]
    assert policy == Policy(
        num_ops=theirs.num_layers,
        magnitude=operation.magnitude,
        magnitude_std=operation.magnitude_std,
        magnitude_max=operation.magnitude_max or 10,
        probability=operation.prob,
        increasing=operation.name == "PosterizeIncreasing",
    )
