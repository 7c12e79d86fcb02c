"""Single-image preprocessing against torchvision on PIL images, bit for bit."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from deit_jax.errors import InputError
from deit_jax.inference.preprocess import preprocess
from deit_jax.models.info import ModelInfo
from tests.oracles.torchvision_ops import import_torchvision


def info(**changes) -> ModelInfo:
    return ModelInfo("any", **({"num_classes": 3, "image_size": 32} | changes))


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def torchvision_chain(image: Image.Image, i: ModelInfo) -> np.ndarray:
    transforms = import_torchvision().transforms
    mode = transforms.InterpolationMode(i.interpolation)
    if i.crop_ratio is None:
        geometry = [transforms.Resize((i.image_size, i.image_size), interpolation=mode)]
    else:
        short = int(i.image_size / i.crop_ratio)
        geometry = [
            transforms.Resize(short, interpolation=mode),
            transforms.CenterCrop(i.image_size),
        ]
    chain = [*geometry, transforms.ToTensor(), transforms.Normalize(i.mean, i.std)]
    tensor = transforms.Compose(chain)(image.convert("RGB"))
    return tensor.permute(1, 2, 0).numpy()[None]


def assert_as_torchvision(i: ModelInfo, source: Image.Image | Path) -> None:
    """Compares bit for bit; a file is read by torchvision's own loader."""
    image = source
    if isinstance(source, Path):
        image = import_torchvision().datasets.folder.pil_loader(source)
    want = torchvision_chain(image, i)
    np.testing.assert_array_equal(preprocess(i, source), want, err_msg=str(source))


def test_bit_equal_to_torchvision_for_odd_sizes_and_settings():
    # 57 → 36 wide leaves halves such as 10.5 and 1.5 to round; 20×90 is enlarged.
    for width, height in ((57, 33), (33, 57), (36, 36), (37, 61), (99, 40), (20, 90), (90, 21)):
        for changes in ({}, {"crop_ratio": 1.0}, {"crop_ratio": 0.9, "image_size": 33}):
            assert_as_torchvision(info(**changes), noise(width, height))
    for changes in (
        {"interpolation": "bilinear"},
        {"interpolation": "lanczos"},
        {"crop_ratio": None},
        {"crop_ratio": None, "image_size": 80, "mean": (0.5, 0.4, 0.3), "std": (0.5, 0.6, 0.7)},
    ):
        assert_as_torchvision(info(**changes), noise(71, 45))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "P", "1"])
def test_every_mode_is_converted_to_rgb(mode):
    image = noise(50, 41).convert("L" if mode == "LA" else "RGB").convert(mode)
    assert_as_torchvision(info(), image)


def test_path_array_pil_and_model_agree(tmp_path: Path):
    image = noise(60, 45)
    path = tmp_path / "image.png"
    image.save(path)
    want = preprocess(info(), image)
    model = SimpleNamespace(info=info())
    for source in (path, str(path), np.asarray(image)):
        np.testing.assert_array_equal(preprocess(model, source), want)
    grey = image.convert("L")
    np.testing.assert_array_equal(preprocess(info(), np.asarray(grey)), preprocess(info(), grey))


@pytest.fixture(scope="module")
def hundred_jpegs(sample_images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The pictures near here, up to 100; what is missing is made: odd sizes, grey, CMYK."""
    files = sorted(sample_images.rglob("*.JPEG"))[:100]
    folder = tmp_path_factory.mktemp("jpegs")
    sizes = np.random.default_rng(0).integers(90, 700, (100 - len(files), 2))
    for number, (width, height) in enumerate(sizes):
        picture = noise(int(width), int(height))
        files.append(folder / f"{number}.JPEG")
        picture.convert(("RGB", "L", "RGB", "CMYK")[number % 4]).save(files[-1], quality=90)
    return files


@pytest.mark.parametrize(("size", "crop_ratio"), [(224, 0.875), (224, 0.9), (224, 1.0), (384, 1.0)])
def test_bit_equal_on_a_hundred_jpegs(hundred_jpegs, size, crop_ratio):
    assert len(hundred_jpegs) == 100
    for path in hundred_jpegs:
        assert_as_torchvision(info(image_size=size, crop_ratio=crop_ratio), path)


@pytest.mark.parametrize(
    "name", ["rgba.png", "grey.jpg", "cmyk.jpg", "sideways.jpg", "upside_down.jpg"]
)
def test_bit_equal_to_the_references_loader_on_other_files(tmp_path: Path, name):
    picture, exif = noise(300, 200), Image.Exif()
    # The reference ignores EXIF: a picture taken sideways stays so.
    if orientation := {"sideways.jpg": 6, "upside_down.jpg": 3}.get(name):
        exif[0x0112] = orientation
    elif name == "rgba.png":
        picture.putalpha(picture.getchannel("R"))
    else:
        picture = picture.convert({"grey.jpg": "L", "cmyk.jpg": "CMYK"}[name])
    picture.save(tmp_path / name, exif=exif)
    with Image.open(tmp_path / name) as saved:
        assert saved.getexif().get(0x0112) == orientation
    for changes in ({"image_size": 224}, {"crop_ratio": None}):
        assert_as_torchvision(info(**changes), tmp_path / name)


def test_a_batch_is_its_images(tmp_path: Path):
    noise(60, 45).save(tmp_path / "file.png")
    images = [tmp_path / "file.png", noise(30, 50), np.asarray(noise(20, 20)), np.zeros((9, 8))]
    images[3] = images[3].astype(np.uint8)
    alone = np.concatenate([preprocess(info(), image) for image in images])
    np.testing.assert_array_equal(preprocess(info(), images), alone)
    np.testing.assert_array_equal(preprocess(info(), tuple(images)), alone)
    array = np.stack([np.asarray(noise(20, 20)), np.full((20, 20, 3), 7, np.uint8)])
    alone = np.concatenate([preprocess(info(), image) for image in array])
    np.testing.assert_array_equal(preprocess(info(), array), alone)


def test_bad_files_and_arrays_give_one_clear_line(tmp_path: Path):
    text = tmp_path / "notes.jpg"
    text.write_text("not an image")
    png = tmp_path / "cut.png"
    noise(60, 45).save(png)
    png.write_bytes(png.read_bytes()[:2000])
    cases = [
        (tmp_path / "missing.jpg", "no such image file"),
        (text, "the file begins with b'not an i', expected JPEG, PNG,"),
        (png, r"cut\.png: cannot be read as PNG: image file is truncated"),
        (tmp_path, "is a folder; name its files$"),
        (Image.new("I;16", (8, 8)), r"more than eight bits \(mode I;16\), expected eight"),
        (np.zeros((8, 8, 3), np.float32), r"float32 array of shape \(8, 8, 3\): expected uint8"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"image 0 of 2: .*shape \(3, 8, 8\)"),
        ([noise(8, 8), tmp_path / "missing.jpg"], "image 1 of 2: .*no such image file"),
        ([], "list of images is empty"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \(3, 8, 8\)"),
        (np.zeros((0, 8, 3), np.uint8), r"shape \(0, 8, 3\)"),
        (None, "object array"),
    ]
    for source, message in cases:
        with pytest.raises(InputError, match=message) as error:
            preprocess(info(), source)
        assert "\n" not in str(error.value)
    for field, value in {"interpolation": "cubic", "crop_ratio": 1.5}.items():
        with pytest.raises(InputError, match=f"{field} is .*{value}"):
            preprocess(info(**{field: value}), noise(8, 8))
