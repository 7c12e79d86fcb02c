"""The simple random crop against torchvision's Resize and RandomCrop on PIL images."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from scipy import stats

from deit_jax.data.crop import centre_crop, draw_offset, simple_random_crop, without_lines
from deit_jax.data.failures import reason_of
from deit_jax.errors import InputError
from deit_jax.inference.preprocess import preprocess
from deit_jax.models.info import ModelInfo
from tests.data.conftest import drawn, graph, picture
from tests.oracles.torchvision_ops import import_torchvision
from tests.refusal import refusal

transforms = import_torchvision().transforms
_MODES = {
    "bicubic": transforms.InterpolationMode.BICUBIC,
    "bilinear": transforms.InterpolationMode.BILINEAR,
}


@functools.cache
def _crop(size, interpolation, pad):
    """(image, offset) → uint8 [size, size, 3], traced once for images of any shape."""
    how = {"size": size, "interpolation": interpolation, "pad": pad}
    return graph(
        lambda image, offset: simple_random_crop(image, offset, **how),
        (tf.uint8, (None, None, 3)),
        (tf.int32, (2,)),
    )


def _check(image, size, interpolation="bicubic", pad=4, places=None):
    """Compares with torchvision at the corners and in the middle, or at the given places."""
    resized = transforms.Resize(size, interpolation=_MODES[interpolation])(Image.fromarray(image))
    crop = transforms.RandomCrop(size, padding=pad, padding_mode="reflect")
    rooms = [side + 2 * pad - size for side in (resized.height, resized.width)]
    for y, x in places or [(0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5), (0.1, 0.8)]:
        top, left = (int(share * room) for share, room in zip((y, x), rooms, strict=True))
        crop.get_params = lambda *_, top=top, left=left: (top, left, size, size)
        got = _crop(size, interpolation, pad)(image, (top, left))
        np.testing.assert_array_equal(got, crop(resized), err_msg=f"{image.shape} {top} {left}")


@pytest.mark.slow
@pytest.mark.parametrize("size", [224, 96, 33])
def test_equals_torchvision_on_photographs(jpegs, size):
    rng = np.random.default_rng(size)
    for path in jpegs[::3]:
        image = np.asarray(Image.open(path).convert("RGB"))
        _check(image, size, places=[*rng.uniform(0, 1.001, (2, 2)), (0, 1)])


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 7), (9, 1), (20, 31), (32, 32), (32, 47), (3, 400), (400, 3)]
)
def test_equals_torchvision_on_small_and_narrow_images(shape):
    _check(picture(0, *shape), 32)


def test_equals_torchvision_on_a_very_wide_image():
    wide = picture(1, 3, 20_000)
    _check(wide, 16, places=[(0, 0), (1, 1), (0.5, 0.3)])
    _check(np.ascontiguousarray(wide.transpose(1, 0, 2)), 16, places=[(0, 0), (1, 1), (0.3, 0.5)])


@pytest.mark.parametrize(
    ("interpolation", "pad"), [("bilinear", 4), ("bicubic", 0), ("bicubic", 7)]
)
def test_other_interpolation_and_border(interpolation, pad):
    _check(picture(2, 50, 61), 32, interpolation, pad)


def test_the_long_side_is_truncated():
    # 224 · 500 / 375 = 298.67 goes to 298: the last place is 298 + 8 - 224.
    offsets = _offsets((375, 500), 224, 3000)
    assert offsets.max(axis=0).tolist() == [8, 298 + 8 - 224]


def _offsets(shape, size, count):
    return drawn(lambda seed: draw_offset(seed, tf.constant(shape), size=size, pad=4), count)


@pytest.mark.parametrize("shape", [(32, 40), (77, 64)])
def test_every_place_is_equally_likely(shape):
    offsets = _offsets(shape, 32, 20_000)
    sides = [32 * side // min(shape) + 8 - 32 + 1 for side in shape]
    assert offsets.min() == 0
    places = np.bincount(np.ravel_multi_index(offsets.T, sides), minlength=np.prod(sides))
    assert stats.chisquare(places).pvalue > 1e-3


def test_a_border_wider_than_the_image_is_refused():
    image, offset = tf.constant(picture(4, 8, 8)), tf.constant([0, 0])
    with pytest.raises(InputError, match=r"image_size is 4 .*pad 4"):
        simple_random_crop(image, offset, size=4, interpolation="bicubic", pad=4)


@pytest.mark.parametrize("shape", [(1, 4000), (4000, 1), (1, 200_000)])
def test_a_line_is_refused_by_evaluation_and_prediction_alike(tmp_path, shape):
    """92 bytes, of which resizing makes 262 million pixels."""
    path = tmp_path / "line.png"
    Image.new("RGB", shape[::-1]).save(path)
    info = ModelInfo("any", num_classes=3, image_size=224)
    said = refusal(preprocess, info, path)
    long = 256 * max(shape)
    assert f"{path}: a picture of {shape[1]:,}×{shape[0]:,} pixels" in said
    assert f"a side of {long:,}" in said
    how = {"size": 224, "crop_ratio": 0.875, "interpolation": "bicubic"}
    with pytest.raises(tf.errors.OpError) as caught:
        centre_crop(tf.constant(path.read_bytes()), **how)
    assert said.partition(": ")[2] in reason_of(caught.value)
    with pytest.raises(tf.errors.OpError):
        without_lines(tf.constant(shape), 224)


@pytest.mark.parametrize("size", [(20_000, 50), (50, 20_000), (5000, 16)])
def test_what_is_no_line_is_read(size):
    picture = Image.new("RGB", size, (10, 20, 30))
    info = ModelInfo("any", num_classes=3, image_size=224, mean=(0,) * 3, std=(1,) * 3)
    want = np.full((224, 224, 3), (10, 20, 30))
    assert (np.round(255 * preprocess(info, picture)[0]) == want).all()
    how = {"size": 224, "crop_ratio": 0.875, "interpolation": "bicubic"}
    assert (centre_crop(tf.constant(np.asarray(picture)), **how).numpy() == want).all()
