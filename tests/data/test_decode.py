"""Image files of common and rare kinds, which are read as Pillow reads them."""

import io
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from deit_jax.data import transforms
from deit_jax.data.crop import draw_box
from deit_jax.data.decode import decode, decode_jpeg_box
from deit_jax.data.draws import fold
from tests.data.conftest import SIDE, encode, graph, picture


def _png_of_16_bits(pixels, colour_type):
    """Pillow writes 16 bits for grey images only."""

    def chunk(name, content):
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(chunk, chunks, chunks.values()))


def _rare_files():
    colour = Image.fromarray(picture(0, 30, 40))
    grey, palette, translucent = colour.convert("L"), colour.quantize(16), colour.copy()
    translucent.putalpha(grey)
    words = np.random.default_rng(0).integers(0, 2**16, (30, 40, 4))
    rotated = Image.Exif()
    rotated[0x0112] = 6  # "rotate me": the reference does not
    return {
        "CMYK JPEG": encode(colour.convert("CMYK"), "JPEG"),
        "grey JPEG": encode(grey, "JPEG"),
        "JPEG turned by EXIF": encode(colour, "JPEG", exif=rotated),
        "JPEG and more": encode(colour, "JPEG") + b"another file",
        "PNG named JPEG, as one of ImageNet": encode(colour, "PNG"),
        "grey PNG": encode(grey, "PNG"),
        "PNG with alpha": encode(translucent, "PNG"),
        "grey PNG with alpha": encode(translucent.convert("LA"), "PNG"),
        "PNG with a palette": encode(palette, "PNG"),
        "PNG of 16 bits": _png_of_16_bits(words[..., :3], 2),
        "PNG of 16 bits with alpha": _png_of_16_bits(words, 6),
        "grey PNG of 16 bits with alpha": _png_of_16_bits(words[..., :2], 4),
        "PNG of 1 bit": encode(colour.convert("1"), "PNG"),
        "palette with a transparent colour": encode(palette, "PNG", transparency=3),
        "palette with alpha": encode(translucent.quantize(16), "PNG"),
        "grey with a transparent value": encode(grey, "PNG", transparency=100),
        "BMP": encode(colour, "BMP"),
        "BMP with a palette": encode(palette, "BMP"),
        "BMP with alpha": encode(translucent, "BMP"),
        "grey BMP": encode(grey, "BMP"),
        "GIF": encode(palette, "GIF", save_all=True, append_images=[colour.quantize(8)]),
        "one pixel": encode(Image.fromarray(picture(1, 1, 1)), "JPEG"),
        "very wide": encode(Image.fromarray(picture(2, 3, 20_000)), "JPEG"),
    }


_RARE = _rare_files()


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # Pillow's, of one file
def test_files_are_what_the_reference_loads(jpegs):
    decode_file = graph(decode, (tf.string, ()))
    for kind, content in ({path.name: path.read_bytes() for path in jpegs} | _RARE).items():
        want = Image.open(io.BytesIO(content)).convert("RGB")
        np.testing.assert_array_equal(decode_file(content), want, err_msg=kind)


def test_where_we_leave_the_reference():
    """See `decode`: its white images help nobody, and GIFs it does not read at all."""
    words = np.random.default_rng(0).integers(0, 2**16, (30, 40))
    grey = _png_of_16_bits(words, 0)
    want = np.repeat((words >> 8)[..., None], 3, axis=-1)
    np.testing.assert_array_equal(decode(tf.constant(grey)), want)
    assert np.median(Image.open(io.BytesIO(grey)).convert("RGB")) == 255

    palette = Image.fromarray(picture(0, 30, 40)).quantize(16)
    gif = encode(palette, "GIF", transparency=3)
    want = np.asarray(palette.convert("RGB")) * (np.asarray(palette) != 3)[..., None]
    np.testing.assert_array_equal(decode(tf.constant(gif)), want)

    no_end = encode(palette, "PNG")[:-12]
    Image.open(io.BytesIO(no_end)).load()
    for rejected in (no_end, encode(palette.convert("1"), "BMP")):
        with pytest.raises(tf.errors.InvalidArgumentError):
            decode(tf.constant(rejected))


def test_jpeg_box_equals_the_cut_of_the_decoded_image(jpegs):
    function = graph(decode_jpeg_box, (tf.string, ()), (tf.int32, (4,)), (tf.int32, ()))
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one pixel", "very wide"])
def test_extreme_sizes_pass_through_training_and_evaluation(kind, input_config):
    image = Image.open(io.BytesIO(_RARE[kind]))
    input_config.update({"hflip": 0.0, "crop_ratio": 1.0})
    seeds = tf.constant([[0, 1], [0, 2]], tf.int64)
    views = transforms.train_transform(input_config, image_size=SIDE)(
        tf.constant(_RARE[kind]), seeds
    )
    for seed, view in zip(seeds, views, strict=True):
        how = {name: input_config[name] for name in ("scale", "ratio")}
        box = draw_box(*image.size[::-1], fold(seed, transforms._CROP), **how).numpy()
        cut = image.crop((box[1], box[0], box[1] + box[3], box[0] + box[2]))
        want = cut.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(view, want)

    width, height = image.size
    whole = image.resize((width * SIDE // height, SIDE), Image.Resampling.BICUBIC)
    left = round((whole.width - SIDE) / 2)
    got = transforms.eval_transform(input_config, image_size=SIDE)(tf.constant(_RARE[kind]))
    np.testing.assert_array_equal(got, whole.crop((left, 0, left + SIDE, SIDE)))
