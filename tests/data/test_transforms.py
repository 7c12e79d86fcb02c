import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageFilter, ImageOps
from scipy import stats

from deit_jax.data import three_augment, transforms
from deit_jax.data.crop import draw_offset, pad_and_crop, random_box
from deit_jax.data.decode import decode, decode_jpeg_box
from deit_jax.data.draws import fold
from tests.data.conftest import picture
from tests.oracles.torchvision_ops import import_torchvision

_SEED = tf.constant([3, 5], tf.int64)


def _seeds(count):
    return tf.data.Dataset.range(count).map(lambda i: tf.stack([tf.constant(11, tf.int64), i]))


def _encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_decode_equals_pillow_for_every_kind_of_file(jpegs):
    colour = Image.fromarray(picture(0, 33, 47))
    grey = colour.convert("L")
    alpha = colour.copy()
    alpha.putalpha(grey)
    files = [path.read_bytes() for path in jpegs] + [
        _encode(colour, "PNG"),
        _encode(grey, "PNG"),
        _encode(alpha, "PNG"),
        _encode(alpha.convert("LA"), "PNG"),
        _encode(colour.quantize(16), "PNG"),
        _encode(colour, "BMP"),
    ]
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate me": the reference does not
    files.append(_encode(colour, "JPEG", exif=exif))
    decode_file = tf.function(decode, input_signature=[tf.TensorSpec((), tf.string)])
    for number, data in enumerate(files):
        want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(decode_file(data), want, err_msg=f"file {number}")


def test_jpeg_box_equals_the_cut_of_the_decoded_image(jpegs):
    specs = (tf.string, ()), (tf.int32, (4,)), (tf.int32, ())
    function = tf.function(
        decode_jpeg_box,
        input_signature=[tf.TensorSpec(shape, kind) for kind, shape in specs],
    )
    rng = np.random.default_rng(0)
    for path in jpegs:
        image = np.asarray(Image.open(path).convert("RGB"))
        for left_step in (1, 8, 16):  # libjpeg decodes from block borders: those are the risk
            height, width = (int(rng.integers(1, side + 1)) for side in image.shape[:2])
            top = int(rng.integers(0, image.shape[0] - height + 1))
            left = int(rng.integers(0, image.shape[1] - width + 1)) // left_step * left_step
            box = (top, left, height, width)
            got = function(path.read_bytes(), box, image.shape[1])
            want = image[top : top + height, left : left + width]
            np.testing.assert_array_equal(got, want, err_msg=f"{path.name} {box}")


@pytest.mark.parametrize("crop_ratio", [0.875, 1.0])
def test_evaluation_equals_torchvision_on_pil(jpegs, input_config, crop_ratio):
    transforms = import_torchvision().transforms
    bicubic = transforms.InterpolationMode.BICUBIC
    input_config.crop_ratio = crop_ratio
    for size in (96, 224):
        reference = transforms.Compose(
            [
                transforms.Resize(int(size / crop_ratio), interpolation=bicubic),
                transforms.CenterCrop(size),
            ]
        )
        transform = tf.function(
            transforms.eval_transform(input_config, image_size=size),
            input_signature=[tf.TensorSpec((), tf.string)],
        )
        for path in jpegs[::2]:
            want = np.asarray(reference(Image.open(path).convert("RGB")))
            got = transform(path.read_bytes())
            np.testing.assert_array_equal(got, want, err_msg=path.name)


def test_evaluation_rounds_offsets_half_to_even(input_config):
    # 383 rows around a crop of 224: (383 - 224) / 2 = 79.5 goes to 80, where flooring gives 79.
    image = picture(1, 383, 256)
    got = transforms.eval_transform(input_config, image_size=224)(tf.constant(image))
    np.testing.assert_array_equal(got, image[80:304, 16:240])


def test_random_resized_crop_is_pils_resize_of_the_box(jpegs, input_config):
    """Of one view, of two of the same JPEG, of a PNG; flipped or not by a flip of its own."""
    input_config.hflip = 0.0
    settings = {"scale": input_config.scale, "ratio": input_config.ratio}
    specs = [tf.TensorSpec((), tf.string), tf.TensorSpec((None, 2), tf.int64)]
    function = tf.function(
        transforms.train_transform(input_config, image_size=64), input_signature=specs
    )
    for number, path in enumerate(jpegs):
        image = Image.open(path).convert("RGB")
        seeds = np.array([[number, 2], [number, 3]])
        want = []
        for seed in seeds:
            crop_seed = fold(tf.constant(seed), transforms._CROP)
            top, left, height, width = random_box(*image.size[::-1], crop_seed, **settings)
            box = [int(value) for value in (left, top, left + width, top + height)]
            want.append(np.asarray(image.crop(box).resize((64, 64), Image.Resampling.BICUBIC)))
        data = path.read_bytes()
        np.testing.assert_array_equal(function(data, seeds), want, err_msg=path.name)
        np.testing.assert_array_equal(function(data, seeds[:1]), want[:1], err_msg=path.name)
        png = _encode(image, "PNG")
        np.testing.assert_array_equal(function(png, seeds[1:]), want[1:], err_msg=path.name)
    input_config.on_bad_image = "skip"
    transform = transforms.train_transform(input_config, image_size=64)
    for source in (np.asarray(image), data):  # decoded already, and to be decoded whole
        np.testing.assert_array_equal(transform(tf.constant(source), tf.constant(seeds)), want)


@pytest.mark.parametrize(
    ("size", "count"), [((375, 500), 20_000), ((500, 300), 4000), ((60, 100), 4000)]
)
def test_boxes_have_torchvisions_distribution(size, count, input_config):
    transforms = import_torchvision().transforms
    import torch

    torch.manual_seed(0)
    height, width = size
    scale, ratio = input_config.scale, input_config.ratio
    ours = _seeds(count).map(lambda seed: random_box(height, width, seed, scale=scale, ratio=ratio))
    ours = next(ours.batch(count).as_numpy_iterator()).astype(float)
    blank = torch.zeros(3, height, width)
    get_params = transforms.RandomResizedCrop.get_params
    theirs = np.array([get_params(blank, scale, ratio) for _ in range(count)], float)
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
    transforms = import_torchvision().transforms
    import torch

    height, width = size
    scale, ratio = (4.0, 4.0), (0.75, 4 / 3)  # four times the image: no draw fits
    want = transforms.RandomResizedCrop.get_params(torch.zeros(3, height, width), scale, ratio)
    got = random_box(height, width, _SEED, scale=scale, ratio=ratio)
    assert tuple(int(value) for value in got) == want


def test_flip_mirrors_with_the_given_probability():
    image = tf.constant(picture(2, 5, 7))
    flipped = _seeds(2000).map(lambda seed: transforms.random_flip(image, seed, probability=0.3))
    mirrored = 0
    for got in flipped.as_numpy_iterator():
        if (got == image.numpy()).all():
            continue
        np.testing.assert_array_equal(got, image.numpy()[:, ::-1])
        mirrored += 1
    assert abs(mirrored / 2000 - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 2000)


def test_pad_and_crop_takes_every_offset_of_the_padded_image():
    image = picture(3, 6, 6)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    windows = {padded[y : y + 6, x : x + 6].tobytes(): (y, x) for y in range(5) for x in range(5)}
    crops = _seeds(1000).map(lambda seed: pad_and_crop(tf.constant(image), seed, pad=2))
    counts = np.zeros((5, 5))
    for crop in crops.as_numpy_iterator():
        counts[windows[crop.tobytes()]] += 1
    assert counts.min() > 15  # 40 expected in each
    assert counts.max() < 70


def test_small_images_are_resized_whole_and_only_if_needed(input_config):
    input_config.update({"train_crop": "small", "pad": 0, "hflip": 0.0})
    image = picture(4, 8, 11)
    want = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC))
    evaluation = transforms.eval_transform(input_config, image_size=16)
    training = transforms.train_transform(input_config, image_size=16)
    for data in (tf.constant(image), tf.constant(_encode(Image.fromarray(image), "PNG"))):
        np.testing.assert_array_equal(evaluation(data), want)
        np.testing.assert_array_equal(training(data, _SEED[None])[0], want)
    np.testing.assert_array_equal(evaluation(tf.constant(want)), want)


@pytest.mark.parametrize("train_crop", ["random_resized", "simple_random", "small"])
def test_training_is_a_function_of_the_seed_eagerly_and_in_a_map(jpegs, input_config, train_crop):
    input_config.train_crop = train_crop
    data = jpegs[0].read_bytes()
    transform = transforms.train_transform(input_config, image_size=32)
    seeds = list(_seeds(8).as_numpy_iterator())
    mapped = _seeds(8).batch(4).map(lambda seeds: transform(tf.constant(data), seeds)).unbatch()
    images = list(mapped.as_numpy_iterator())
    for seed, image in zip(seeds, images, strict=True):
        np.testing.assert_array_equal(transform(tf.constant(data), seed[None])[0], image)
    assert len({image.tobytes() for image in images}) == 8


def test_deit_iii_augments_in_the_order_of_the_reference(jpegs, input_config):
    """Crop, flip, one of grey, solarise and blur, jitter; torchvision with the numbers drawn."""
    transforms = import_torchvision().transforms
    functional, bicubic = transforms.functional, transforms.InterpolationMode.BICUBIC
    settings = {"train_crop": "simple_random", "three_augment": True, "color_jitter": 0.3}
    input_config.update(settings)
    transform = tf.function(transforms.train_transform(input_config, image_size=64))
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
        crop = functional.pad(functional.resize(image, 64, bicubic), 4, padding_mode="reflect")
        shape = tf.constant(image.size[::-1])
        top, left = draw_offset(fold(seed, transforms._CROP), shape, size=64, pad=4)
        want = crop.crop((int(left), int(top), int(left) + 64, int(top) + 64))
        blank = tf.reshape(tf.range(2, dtype=tf.int32), (1, 2, 1))
        if (
            transforms.random_flip(blank, fold(seed, transforms._FLIP), probability=0.5)[0, 0, 0]
            == 1
        ):
            want = functional.hflip(want)
        three = three_augment.draw_three_augment(fold(seed, transforms._AUGMENT))
        want = operations[three_augment.THREE[int(three.operation)]](want, float(three.radius))
        jitter = three_augment.draw_color_jitter(fold(seed, transforms._JITTER), 0.3)
        for name in three_augment.ORDERS[int(jitter.order)]:
            want = adjust[name](want, float(getattr(jitter, name)))
        got = transform(tf.constant(path.read_bytes()), seed[None])[0]
        np.testing.assert_array_equal(got, want, err_msg=path.name)
