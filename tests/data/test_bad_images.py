"""Image files of rare kinds, which are read as Pillow reads them, and broken ones."""

import errno
import io
import itertools
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from deit_jax import data
from deit_jax.data import transforms
from deit_jax.data.crop import random_box
from deit_jax.data.decode import decode
from deit_jax.data.draws import fold
from deit_jax.errors import InputError, TransientError
from tests.data.conftest import CountingSource, permutation, picture

_SIDE = 24  # of the images in folders, and of what is made of them: few shapes to compile for


def _encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _png_of_16_bits(pixels, colour_type):
    """Pillow writes 16 bits for grey images only."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(
            ">I", zlib.crc32(name + content)
        )  # fmt: skip

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)),
         chunk(b"IEND", b"")]
    )  # fmt: skip


def _rare_files():
    colour = Image.fromarray(picture(0, 30, 40))
    translucent = colour.copy()
    translucent.putalpha(colour.convert("L"))
    palette = colour.quantize(16)
    words = np.random.default_rng(0).integers(0, 2**16, (30, 40, 4))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    return {
        "CMYK JPEG": _encode(colour.convert("CMYK"), "JPEG"),
        "grey JPEG": _encode(colour.convert("L"), "JPEG"),
        "JPEG turned by EXIF": _encode(colour, "JPEG", exif=rotated),
        "JPEG and more": _encode(colour, "JPEG") + b"another file",
        "PNG named JPEG, as one of ImageNet": _encode(colour, "PNG"),
        "PNG of 16 bits": _png_of_16_bits(words[..., :3], 2),
        "PNG of 16 bits with alpha": _png_of_16_bits(words, 6),
        "grey PNG of 16 bits with alpha": _png_of_16_bits(words[..., :2], 4),
        "PNG of 1 bit": _encode(colour.convert("1"), "PNG"),
        "palette with a transparent colour": _encode(palette, "PNG", transparency=3),
        "palette with alpha": _encode(translucent.quantize(16), "PNG"),
        "grey with a transparent value": _encode(colour.convert("L"), "PNG", transparency=100),
        "BMP with a palette": _encode(palette, "BMP"),
        "BMP with alpha": _encode(translucent, "BMP"),
        "grey BMP": _encode(colour.convert("L"), "BMP"),
        "GIF": _encode(palette, "GIF", save_all=True, append_images=[colour.quantize(8)]),
        "one pixel": _encode(Image.fromarray(picture(1, 1, 1)), "JPEG"),
        "very wide": _encode(Image.fromarray(picture(2, 3, 20_000)), "JPEG"),
    }


@pytest.mark.parametrize(("kind", "content"), _rare_files().items(), ids=_rare_files())
def test_rare_files_are_what_the_reference_loads(kind, content):
    want = Image.open(io.BytesIO(content)).convert("RGB")
    np.testing.assert_array_equal(decode(tf.constant(content)), want)


def test_where_we_leave_the_reference():
    """See `ops.decode`: its white images help nobody, and GIFs it does not read at all."""
    words = np.random.default_rng(0).integers(0, 2**16, (30, 40))
    grey = _png_of_16_bits(words, 0)
    want = np.repeat((words >> 8)[..., None], 3, axis=-1)
    np.testing.assert_array_equal(decode(tf.constant(grey)), want)
    assert np.median(Image.open(io.BytesIO(grey)).convert("RGB")) == 255

    palette = Image.fromarray(picture(0, 30, 40)).quantize(16)
    gif = _encode(palette, "GIF", transparency=3)
    want = np.asarray(palette.convert("RGB")) * (np.asarray(palette) != 3)[..., None]
    np.testing.assert_array_equal(decode(tf.constant(gif)), want)

    no_end = _encode(palette, "PNG")[:-12]
    Image.open(io.BytesIO(no_end)).load()
    for refused in (no_end, _encode(palette.convert("1"), "BMP")):
        with pytest.raises(tf.errors.InvalidArgumentError):
            decode(tf.constant(refused))


@pytest.mark.parametrize("kind", ["one pixel", "very wide"])
def test_extreme_sizes_pass_through_training_and_evaluation(kind, input_config):
    content = _rare_files()[kind]
    image = Image.open(io.BytesIO(content))
    width, height = image.size
    input_config.update({"hflip": 0.0, "crop_ratio": 1.0})
    seeds = tf.constant([[0, 1], [0, 2]], tf.int64)
    views = transforms.train_transform(input_config, image_size=_SIDE)(tf.constant(content), seeds)
    for seed, view in zip(seeds, views, strict=True):
        how = {name: input_config[name] for name in ("scale", "ratio")}
        box = random_box(height, width, fold(seed, transforms._CROP), **how).numpy()
        cut = image.crop((box[1], box[0], box[1] + box[3], box[0] + box[2]))
        want = cut.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(view, want)

    whole = image.resize((width * _SIDE // height, _SIDE), Image.Resampling.BICUBIC)
    left = round((whole.width - _SIDE) / 2)
    got = transforms.eval_transform(input_config, image_size=_SIDE)(tf.constant(content))
    np.testing.assert_array_equal(got, whole.crop((left, 0, left + _SIDE, _SIDE)))


@pytest.fixture
def folder(tmp_path, dataset_config):
    """Twelve JPEGs of one size in two classes, as the train and the eval split."""
    for number in range(12):
        path = tmp_path / "train" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number, _SIDE, _SIDE)).save(path, quality=90)
    (tmp_path / "val").symlink_to(tmp_path / "train")
    dataset_config.root = str(tmp_path)
    return dataset_config


def _cut_short(path):
    path.write_bytes(path.read_bytes()[:-50])


def _cut_short_as_png(path):
    path.write_bytes(_encode(Image.open(path), "PNG")[:-100])


_DAMAGES = {
    "cut short": _cut_short,
    "a PNG cut short": _cut_short_as_png,
    "cut in its header": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"not an image, but longer than any header is"),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", ["cut short", "gone"])
def test_an_unreadable_file_ends_training_and_evaluation(folder, input_config, damage):
    input_config.update({"scale": (1.0, 1.0), "ratio": (1.0, 1.0)})
    source = data.open_source(folder, "train")
    victim = Path(source.example_id(7))
    _DAMAGES[damage](victim)
    sizes = {"image_size": _SIDE, "batch_size": 4}
    for batches in (
        data.train_batches(source, input_config, **sizes, steps_per_epoch=3, seed=0, start_step=3),
        data.eval_batches(source, input_config, **sizes),
    ):
        with pytest.raises(InputError) as caught:
            list(itertools.islice(batches, 3))
        assert f"{victim} cannot be used" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not batches.skipped


def test_every_kind_of_damage_is_found_and_named(folder, input_config):
    input_config.update({"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "on_bad_image": "skip"})
    source = data.open_source(folder, "train")
    victims = [source.example_id(2 * number) for number in range(len(_DAMAGES))]
    for victim, damage in zip(victims, _DAMAGES.values(), strict=True):
        damage(Path(victim))
    sizes = {"image_size": _SIDE, "batch_size": 12}
    for batches in (
        data.train_batches(source, input_config, **sizes, steps_per_epoch=1, seed=0),
        data.eval_batches(source, input_config, **sizes),
    ):
        next(batches)
        assert sorted(batches.skipped) == sorted(victims)
        for reason in batches.skipped.values():
            assert reason
            assert not set("\n[{") & set(reason)
            assert "Iterator" not in reason


def test_damage_below_the_crop_of_a_single_view_goes_unnoticed(folder, input_config):
    """And it does no harm; several views, or broken images to be skipped, need the whole image."""
    path = Path(data.open_source(folder, "train").example_id(0))
    intact = tf.constant(path.read_bytes())
    _cut_short(path)
    cut_short = tf.constant(path.read_bytes())
    input_config.update({"scale": (0.1, 0.2), "ratio": (1.0, 1.0)})
    transform = transforms.train_transform(input_config, image_size=_SIDE)
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
    transform = transforms.train_transform(input_config, image_size=_SIDE)
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
    shares = [
        data.train_batches(
            source, config, image_size=4, **sizes,
            start_step=steps[0], process_index=index, process_count=processes,
        )
        for index in range(processes)
    ]  # fmt: skip
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


def test_only_the_views_of_broken_files_change(folder, input_config):
    """A view keeps its crop and its flip; which file it shows is all that changes."""
    source = data.open_source(folder, "train")
    input_config.update({"repeats": 3, "scale": (0.5, 0.5), "ratio": (1.0, 1.0)})
    sizes = {"batch_size": 4, "steps_per_epoch": 3, "seed": 3}
    shown = [
        name
        for step in range(6)
        for name in data.example_ids(source, step=step, repeats=3, **sizes)
    ]

    def images():
        batches = data.train_batches(source, input_config, image_size=_SIDE, **sizes)
        return np.concatenate([next(batches)["image"] for _ in range(6)]), batches.skipped

    intact, _ = images()
    broken = {shown[3], shown[20]}
    for name in broken:
        _cut_short(Path(name))
    input_config.on_bad_image = "skip"
    mended, skipped = images()
    assert skipped.keys() == broken
    transform = transforms.train_transform(input_config, image_size=_SIDE)
    others = {source.example_id(index) for index in range(12)} - broken
    for position, name in enumerate(shown):
        if name not in broken:
            np.testing.assert_array_equal(mended[position], intact[position])
        else:
            seeds = tf.constant([[sizes["seed"], position]], tf.int64)
            views = [transform(tf.io.read_file(other), seeds)[0].numpy() for other in others]
            assert any((mended[position] == view).all() for view in views)


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_masks_broken_images_out(plain_config, processes):
    plain_config.on_bad_image = "skip"
    broken = {0, 5, 6, 16}
    seen, skipped = [], {}
    for index in range(processes):
        batches = data.eval_batches(
            BrokenSource(17, broken), plain_config, image_size=4, batch_size=8,
            process_index=index, process_count=processes,
        )  # fmt: skip
        for number, batch in enumerate(batches):
            rows = 8 // processes
            real = batch["mask"] == 1
            first = 8 * number + rows * index
            want = [i not in broken and i < 17 for i in range(first, first + rows)]
            np.testing.assert_array_equal(real, want)
            np.testing.assert_array_equal(batch["label"][real], first + np.flatnonzero(real))
            np.testing.assert_array_equal(batch["image"][real][:, 0, 0, 0], batch["label"][real])
            assert not batch["image"][~real].any()
            seen += batch["label"][real].tolist()
        skipped |= batches.skipped
    assert sorted(seen) == sorted(set(range(17)) - broken)
    assert skipped.keys() == {f"counting:{number}" for number in broken}


def test_a_label_outside_the_classes_is_never_skipped(plain_config):
    plain_config.on_bad_image = "skip"
    source = BrokenSource(10, {1}, num_classes=6)
    sizes = {"image_size": 4, "batch_size": 10}
    for batches in (
        data.eval_batches(source, plain_config, **sizes),
        data.train_batches(source, plain_config, **sizes, steps_per_epoch=1, seed=0),
    ):
        with pytest.raises(InputError, match=r"counting:[6-9] .*label outside the class range"):
            next(batches)


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
    source, sizes = StaleSource(6), {"image_size": 4, "batch_size": 6}
    for batches in (
        data.eval_batches(source, plain_config, **sizes),
        data.train_batches(source, plain_config, **sizes, steps_per_epoch=1, seed=0),
    ):
        with pytest.raises(TransientError, match=r"counting:1 cannot be read now: .*1\.jpg"):
            next(batches)
        assert not batches.skipped


def test_a_split_without_a_readable_image_is_an_error(plain_config):
    plain_config.on_bad_image = "skip"
    source = BrokenSource(3, range(3))
    for batches in (
        data.eval_batches(source, plain_config, image_size=4, batch_size=2),
        data.train_batches(
            source, plain_config, image_size=4, batch_size=2, steps_per_epoch=1, seed=0
        ),
    ):
        with pytest.raises(InputError, match=r"^counting: none of its 3 images can be read .*$"):
            list(itertools.islice(batches, 4))
        assert len(batches.skipped) == 3
