"""Training and evaluation transforms against torchvision on PIL images."""

import numpy as np
import pytest
import tensorflow as tf
import torch
from PIL import Image, ImageFilter, ImageOps
from scipy import stats

from deit_jax.data import three_augment, transforms
from deit_jax.data.crop import draw_box, draw_offset, pad_and_crop
from deit_jax.data.draws import fold
from tests.data.conftest import check_stateless, drawn, encode, graph, picture
from tests.oracles.torchvision_ops import import_torchvision

torchvision = import_torchvision().transforms
_BICUBIC = torchvision.InterpolationMode.BICUBIC
_SEED = tf.constant([3, 5], tf.int64)


@pytest.mark.slow
@pytest.mark.parametrize("crop_ratio", [0.875, 1.0])
def test_evaluation_equals_torchvision_on_pil(jpegs, input_config, crop_ratio):
    input_config.crop_ratio = crop_ratio
    for size in (96, 224):
        resize = torchvision.Resize(int(size / crop_ratio), interpolation=_BICUBIC)
        reference = torchvision.Compose([resize, torchvision.CenterCrop(size)])
        transform = graph(transforms.eval_transform(input_config, image_size=size), (tf.string, ()))
        for path in jpegs[::2]:
            want = np.asarray(reference(Image.open(path).convert("RGB")))
            got = transform(path.read_bytes())
            np.testing.assert_array_equal(got, want, err_msg=path.name)


def test_evaluation_rounds_offsets_half_to_even(input_config):
    # 383 rows around a crop of 224: (383 - 224) / 2 = 79.5 goes to 80, where flooring gives 79.
    image = picture(1, 383, 256)
    got = transforms.eval_transform(input_config, image_size=224)(tf.constant(image))
    np.testing.assert_array_equal(got, image[80:304, 16:240])


@pytest.mark.slow
def test_random_resized_crop_is_pils_resize_of_the_box(jpegs, input_config):
    """Of one view, of two of the same JPEG, of a PNG; flipped or not by a flip of its own."""
    input_config.hflip = 0.0
    settings = {"scale": input_config.scale, "ratio": input_config.ratio}
    transform = transforms.train_transform(input_config, image_size=64)
    function = graph(transform, (tf.string, ()), (tf.int64, (None, 2)))
    for number, path in enumerate(jpegs):
        image = Image.open(path).convert("RGB")
        seeds = np.array([[number, 2], [number, 3]])
        want = []
        for seed in seeds:
            crop_seed = fold(tf.constant(seed), transforms._CROP)
            top, left, height, width = draw_box(
                *map(tf.constant, image.size[::-1]), crop_seed, **settings
            )
            box = [int(value) for value in (left, top, left + width, top + height)]
            want.append(np.asarray(image.crop(box).resize((64, 64), Image.Resampling.BICUBIC)))
        data = path.read_bytes()
        np.testing.assert_array_equal(function(data, seeds), want, err_msg=path.name)
        np.testing.assert_array_equal(function(data, seeds[:1]), want[:1], err_msg=path.name)
        png = encode(image, "PNG")
        np.testing.assert_array_equal(function(png, seeds[1:]), want[1:], err_msg=path.name)
    input_config.on_bad_image = "skip"
    transform = transforms.train_transform(input_config, image_size=64)
    for source in (np.asarray(image), data):  # decoded already, and to be decoded whole
        np.testing.assert_array_equal(transform(tf.constant(source), tf.constant(seeds)), want)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "count"), [((375, 500), 20_000), ((500, 300), 4000), ((60, 100), 4000)]
)
def test_boxes_have_torchvisions_distribution(size, count, input_config):
    torch.manual_seed(0)
    height, width = size
    box = {"scale": input_config.scale, "ratio": input_config.ratio}
    ours = drawn(lambda seed: draw_box(height, width, seed, **box), count).astype(float)
    blank, get_params = torch.zeros(3, height, width), torchvision.RandomResizedCrop.get_params
    theirs = np.array([get_params(blank, *box.values()) for _ in range(count)], float)
    assert (ours[:, 0] + ours[:, 2]).max() <= height
    assert (ours[:, 1] + ours[:, 3]).max() <= width
    for name, statistic in {
        "area": lambda b: b[:, 2] * b[:, 3],
        "aspect": lambda b: b[:, 3] / b[:, 2],
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        # At the last row: offsets include both ends.
        "touches the bottom": lambda b: b[:, 0] + b[:, 2] == height,
    }.items():
        result = stats.ks_2samp(statistic(ours), statistic(theirs), method="asymp")
        assert result.pvalue > 1e-3, name


@pytest.mark.parametrize("size", [(20, 900), (900, 20), (64, 64)])
def test_box_that_never_fits_is_torchvisions_fallback(size):
    height, width = size
    scale, ratio = (4.0, 4.0), (0.75, 4 / 3)  # four times the image: no draw fits
    want = torchvision.RandomResizedCrop.get_params(torch.zeros(3, height, width), scale, ratio)
    got = draw_box(height, width, _SEED, scale=scale, ratio=ratio)
    assert tuple(int(value) for value in got) == want


def test_flip_mirrors_with_the_given_probability():
    image = picture(2, 5, 7)
    got = drawn(lambda seed: transforms.random_flip(image, seed, probability=0.3), 2000)
    mirrored = (got != image).any(axis=(1, 2, 3))
    np.testing.assert_array_equal(got[mirrored], [image[:, ::-1]] * mirrored.sum())
    assert abs(mirrored.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 2000)


def test_pad_and_crop_takes_every_offset_of_the_padded_image():
    image = picture(3, 6, 6)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    windows = {padded[y : y + 6, x : x + 6].tobytes(): (y, x) for y in range(5) for x in range(5)}
    counts = np.zeros((5, 5))
    for crop in drawn(lambda seed: pad_and_crop(tf.constant(image), seed, pad=2), 1000):
        counts[windows[crop.tobytes()]] += 1
    assert counts.min() > 15  # 40 expected in each
    assert counts.max() < 70


def test_small_images_are_resized_whole_and_only_if_needed(input_config):
    input_config.update({"train_crop": "small", "pad": 0, "hflip": 0.0})
    image = picture(4, 8, 11)
    want = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC))
    evaluation = transforms.eval_transform(input_config, image_size=16)
    training = transforms.train_transform(input_config, image_size=16)
    for data in (tf.constant(image), tf.constant(encode(Image.fromarray(image), "PNG"))):
        np.testing.assert_array_equal(evaluation(data), want)
        np.testing.assert_array_equal(training(data, _SEED[None])[0], want)
    np.testing.assert_array_equal(evaluation(tf.constant(want)), want)


@pytest.mark.slow
@pytest.mark.parametrize("train_crop", ["random_resized", "simple_random", "small"])
def test_training_is_a_function_of_the_seed(jpegs, input_config, train_crop):
    input_config.train_crop = train_crop
    data = tf.constant(jpegs[0].read_bytes())
    transform = transforms.train_transform(input_config, image_size=32)
    check_stateless(lambda seed: transform(data, seed[None])[0], count=8, distinct=7)
    seeds = tf.constant([[7, 0], [7, 1]], tf.int64)
    views = [transform(data, seed[None])[0] for seed in seeds]
    np.testing.assert_array_equal(transform(data, seeds), views)


@pytest.mark.slow
def test_deit_iii_augments_in_the_order_of_the_reference(jpegs, input_config):
    """Crop, flip, one of grey, solarise and blur, jitter; torchvision with the numbers drawn."""
    functional = torchvision.functional
    settings = {"train_crop": "simple_random", "three_augment": True, "color_jitter": 0.3}
    input_config.update(settings)
    transform = transforms.train_transform(input_config, image_size=64)
    transform = graph(transform, (tf.string, ()), (tf.int64, (1, 2)))
    operations = {
        "grey": lambda image, radius: functional.to_grayscale(image, 3),
        "solarise": lambda image, radius: ImageOps.solarize(image),
        "blur": lambda image, radius: image.filter(ImageFilter.GaussianBlur(radius)),
    }
    adjust = {
        name: getattr(functional, f"adjust_{name}")
        for name in ("brightness", "contrast", "saturation")
    }
    for number, path in enumerate(jpegs[::2]):
        seed = tf.constant([5, number], tf.int64)
        image = Image.open(path).convert("RGB")
        crop = functional.pad(functional.resize(image, 64, _BICUBIC), 4, padding_mode="reflect")
        shape = tf.constant(image.size[::-1])
        top, left = draw_offset(fold(seed, transforms._CROP), shape, size=64, pad=4)
        want = crop.crop((int(left), int(top), int(left) + 64, int(top) + 64))
        blank = tf.reshape(tf.range(2, dtype=tf.int32), (1, 2, 1))
        flipped = transforms.random_flip(blank, fold(seed, transforms._FLIP), probability=0.5)
        if flipped[0, 0, 0] == 1:
            want = functional.hflip(want)
        three = three_augment.draw_three(fold(seed, transforms._AUGMENT))
        want = operations[three_augment.THREE[int(three.operation)]](want, float(three.radius))
        jitter = three_augment.draw_jitter(fold(seed, transforms._JITTER), 0.3)
        for name in three_augment.ORDERS[int(jitter.order)]:
            want = adjust[name](want, float(getattr(jitter, name)))
        got = transform(tf.constant(path.read_bytes()), seed[None])[0]
        np.testing.assert_array_equal(got, want, err_msg=path.name)
