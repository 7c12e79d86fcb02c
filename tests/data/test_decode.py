"""Image files of all kinds: every part of the product sees the pixels that the reference sees."""

import io
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from flax import nnx
from PIL import Image

import deit_jax
from deit_jax import data, pictures
from deit_jax.data import transforms
from deit_jax.data.crop import draw_box
from deit_jax.data.decode import decode, decode_jpeg_box, open_image
from deit_jax.data.draws import fold
from deit_jax.errors import InputError
from deit_jax.inference.predict import predict
from deit_jax.inference.preprocess import preprocess
from deit_jax.models.info import ModelInfo
from tests.data.conftest import SIDE, graph, plan_of
from tests.data.kinds import READABLE, UNREADABLE

# Pillow's, of one file, and where the reference reads it.
pytestmark = pytest.mark.filterwarnings("ignore:Palette images with Transparency")
_INFO = ModelInfo("any", num_classes=3, image_size=SIDE, mean=(0, 0, 0), std=(1, 1, 1))


def _model():
    shape = {"image_size": SIDE, "patch_size": 8, "depth": 1}
    model = deit_jax.create_model("deit_testing", num_classes=3, **shape, rngs=nnx.Rngs(0))
    model.info = _INFO
    return model


def _reference(content):
    return Image.open(io.BytesIO(content)).convert("RGB")


def test_files_are_what_the_reference_loads(jpegs):
    assert len(READABLE) > 100
    decode_file = graph(decode, (tf.string, ()))

    def cut_out(content, box):
        shape, cut = open_image(content)
        return shape, cut(box)

    cut_file = graph(cut_out, (tf.string, ()), (tf.int32, (4,)))
    for kind, content in ({path.name: path.read_bytes() for path in jpegs} | READABLE).items():
        want = np.asarray(_reference(content))
        np.testing.assert_array_equal(decode_file(content), want, err_msg=kind)
        height, width = want.shape[:2]
        box = (height // 3, width // 4, (height + 1) // 2, (width + 1) // 2)
        shape, got = cut_file(content, box)
        assert (shape[0], shape[1]) == (height, width)
        want = want[box[0] : box[0] + box[2], box[1] : box[1] + box[3]]
        np.testing.assert_array_equal(got, want, err_msg=kind)


def test_common_kinds_are_decoded_by_tensorflow(monkeypatch):
    """Pillow takes longer, and some of it while no other thread can run Python."""
    monkeypatch.setattr(pictures, "read", None)
    jpegs = ("JPEG RGB", "JPEG L", "progressive JPEG", "JPEG turned by EXIF")
    for kind in (*jpegs, *(f"PNG {mode}" for mode in ("L", "LA", "P", "RGB", "RGBA"))):
        decode(tf.constant(READABLE[kind]))
    for kind in ("JPEG CMYK", "PNG 1", "PNG of 16 bits", "PNG without its end", "GIF P"):
        with pytest.raises(tf.errors.OpError, match="NoneType"):
            decode(tf.constant(READABLE[kind]))


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
def test_training_evaluation_and_prediction_see_the_same_picture(input_config, tmp_path):
    input_config.update({"hflip": 0.0, "crop_ratio": _INFO.crop_ratio})
    signature = (tf.string, ()), (tf.int64, (None, 2))
    train = graph(transforms.train_transform(input_config, image_size=SIDE), *signature)
    evaluate = graph(transforms.eval_transform(input_config, image_size=SIDE), (tf.string, ()))
    model = _model()
    how = {name: input_config[name] for name in ("scale", "ratio")}
    files = []
    for kind, content in READABLE.items():
        image = _reference(content)
        files += [tmp_path / f"{kind}.jpg", tmp_path / f"{kind} as the reference sees it.png"]
        files[-2].write_bytes(content)
        image.save(files[-1])
        for seeds in (tf.constant([[0, 1]], tf.int64), tf.constant([[0, 1], [0, 2]], tf.int64)):
            for seed, view in zip(seeds, train(content, seeds), strict=True):
                size = map(tf.constant, image.size[::-1])  # traced once
                box = draw_box(*size, fold(seed, transforms._CROP), **how).numpy()
                cut = image.crop((box[1], box[0], box[1] + box[3], box[0] + box[2]))
                want = cut.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                np.testing.assert_array_equal(view, want, err_msg=kind)
        want = preprocess(_INFO, image)
        np.testing.assert_array_equal(evaluate(content)[None] / np.float32(255), want, kind)
        np.testing.assert_array_equal(preprocess(_INFO, files[-2]), want, kind)
    found = [result["predictions"] for result in predict(model, files, topk=3, batch_size=64)]
    for got, want in zip(found[::2], found[1::2], strict=True):
        assert [one["index"] for one in got] == [one["index"] for one in want]
        probabilities = [[one["probability"] for one in both] for both in (got, want)]
        np.testing.assert_allclose(*probabilities, rtol=1e-4)


@pytest.mark.slow
def test_what_one_part_refuses_all_refuse(folder, input_config):
    """And each names the file and says why, in one line."""
    input_config.update({"on_bad_image": "skip", "crop_ratio": _INFO.crop_ratio})
    files = {}
    for kind, content in UNREADABLE.items():
        path = f"{folder.root}/train/a/{kind.replace(';', '')}.jpg"
        files[path] = content
        with open(path, "wb") as file:
            file.write(content)
    source = data.open_source(folder, "train")
    plan = plan_of(input_config, image_size=SIDE, batch_size=source.num_examples)
    assert len(files) > 25
    model = _model()
    refusals = dict(zip(files, predict(model, list(files)), strict=True))
    for batches in (data.train_batches(source, plan), data.eval_batches(source, plan)):
        next(batches)
        assert batches.skipped.keys() == files.keys()
        for path, reason in batches.skipped.items():
            assert isinstance(refusals[path], InputError), path
            for line in (reason, str(refusals[path])):
                assert "\n" not in line
                assert "Traceback" not in line
                assert "object at" not in line
            if not files[path].startswith(b"\xff\xd8") or "many pixels" in path:
                assert str(refusals[path]) == f"{path}: {reason}"


@pytest.mark.parametrize("kind", pictures.KINDS)
def test_the_first_bytes_tell_the_kind(kind):
    written = [name for name in READABLE if name.startswith(f"{kind} ")]
    assert len(written) > 3
    for name in written:
        assert pictures.kind(READABLE[name][: pictures.FIRST_BYTES]) == kind


@pytest.mark.parametrize("kind", ["JPEG RGB", "progressive grey JPEG", "PNG RGBA", "PNG P"])
def test_damaged_files_never_show_other_pixels(kind):
    """Of a few damaged JPEGs Pillow makes something and TensorFlow nothing, or the reverse."""
    decode_file, rng = graph(decode, (tf.string, ())), np.random.default_rng(0)
    refused = alone = 0
    for _ in range(300):
        content = bytearray(READABLE[kind])
        content[rng.integers(8, len(content))] = rng.integers(256)
        try:
            want = np.asarray(pictures.read(io.BytesIO(content)))
        except InputError:
            want = None
        try:
            got = decode_file(bytes(content)).numpy()
        except tf.errors.OpError:
            got = None
        if want is not None and got is not None:
            np.testing.assert_array_equal(got, want)
        refused += want is got is None
        alone += (want is None) != (got is None)
    assert refused > 10
    assert alone <= (6 if "JPEG" in kind else 0)


@pytest.mark.parametrize(
    ("kind", "chunk", "change"),
    [
        ("PNG RGB", b"IDAT", lambda pixels: pixels[:-4]),  # the checksum of zlib
        ("PNG P", b"PLTE", lambda palette: None),
    ],
)
def test_damaged_pngs_that_pillow_alone_reads(kind, chunk, change):
    """If this fails, the docstring of `decode` says too much."""
    whole = content = READABLE[kind]
    begin = content.index(chunk)
    (length,) = struct.unpack(">I", content[begin - 4 : begin])
    inside = change(content[begin + 4 : begin + 4 + length])
    piece = b""
    if inside is not None:
        checksum = struct.pack(">I", zlib.crc32(chunk + inside))
        piece = struct.pack(">I", len(inside)) + chunk + inside + checksum
    content = content[: begin - 4] + piece + content[begin + 8 + length :]
    decode_file = graph(decode, (tf.string, ()))
    assert decode_file(whole).shape == (*pictures.read(io.BytesIO(content)).size[::-1], 3)
    with pytest.raises(tf.errors.OpError):
        decode_file(content)
