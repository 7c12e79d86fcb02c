"""Prepares images for inference as evaluation does, with PIL and NumPy only.

The pixels equal those of the reference: torchvision's Resize, CenterCrop, ToTensor and Normalize on
PIL images.
"""

import os
from typing import Any

import numpy as np
from PIL import Image

from deit_jax import pictures
from deit_jax.errors import InputError
from deit_jax.models.info import ModelInfo

_INTERPOLATIONS = {
    name: Image.Resampling[name.upper()]
    for name in ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
}


def preprocess(
    model_or_info: ModelInfo | Any, image: str | os.PathLike | Image.Image | np.ndarray | list
) -> np.ndarray:
    """Turns an image, or a batch of images of any sizes, into the model's input.

    The short side is resized to `int(S / crop_ratio)` and the centre S×S is cut out; with
    `crop_ratio` None (small images) the whole image is resized to S×S. Then
    `(x / 255 - mean) / std`.

    Args:
      model_or_info: a ModelInfo, or a model that carries one as `info`.
      image: a path, a PIL image of any mode, or a uint8 array [H,W,3] or [H,W]; of several images a
        list, or a uint8 array [B,H,W,3].

    Returns:
      float32 [B,S,S,3], of one image [1,S,S,3].

    Raises:
      InputError: a missing or unreadable file, an unusable array, an empty list or a bad field of
        `info`.
    """
    if not isinstance(image, (list, tuple)) and getattr(image, "ndim", 0) != 4:
        return _prepare(model_or_info, image)
    images = list(image)
    if not images:
        raise InputError("the list of images is empty; expected at least one")
    prepared = []
    for place, one in enumerate(images):
        try:
            prepared.append(_prepare(model_or_info, one))
        except InputError as error:
            raise InputError(f"image {place} of {len(images)}: {error}") from error
    return np.concatenate(prepared)


def _prepare(
    model_or_info: ModelInfo | Any, image: str | os.PathLike | Image.Image | np.ndarray
) -> np.ndarray:
    """Prepares one image, to [1,S,S,3]."""
    info = getattr(model_or_info, "info", model_or_info)
    if info.interpolation not in _INTERPOLATIONS:
        raise InputError(
            f"interpolation is {info.interpolation!r}: expected one of {', '.join(_INTERPOLATIONS)}"
        )
    resample = _INTERPOLATIONS[info.interpolation]
    picture = _load(image)
    if info.crop_ratio is None:
        picture = picture.resize((info.side, info.side), resample)
    elif 0 < info.crop_ratio <= 1:
        try:
            picture = _resize_and_crop(picture, info.side, info.crop_ratio, resample)
        except InputError as error:
            name = os.fspath(image) if isinstance(image, (str, os.PathLike)) else "image"
            raise InputError(f"{name}: {error}") from error
    else:
        raise InputError(f"crop_ratio is {info.crop_ratio}: expected None or a number in (0, 1]")
    mean, std = (np.asarray(v, np.float32) for v in (info.mean, info.std))
    pixels = np.asarray(picture, np.float32) / np.float32(255)
    return ((pixels - mean) / std)[None]


def _resize_and_crop(
    picture: Image.Image, size: int, crop_ratio: float, resample: Image.Resampling
) -> Image.Image:
    width, height = picture.size
    short = int(size / crop_ratio)
    pictures.check_resized(width, height, short)
    if width <= height:
        width, height = short, int(short * height / width)
    else:
        width, height = int(short * width / height), short
    # Cutting while resizing would sample the borders differently: resize first, as torchvision.
    picture = picture.resize((width, height), resample)
    # round() is half-to-even, like torchvision's: 79.5 becomes 80, and 80.5 too.
    left, top = round((width - size) / 2), round((height - size) / 2)
    return picture.crop((left, top, left + size, top + size))


def _load(image: str | os.PathLike | Image.Image | np.ndarray) -> Image.Image:
    """Opens or wraps an image and converts it to RGB."""
    if isinstance(image, Image.Image):
        return pictures.to_rgb(image)
    if isinstance(image, (str, os.PathLike)):
        try:
            with open(image, "rb") as file:
                return pictures.read(file)
        except FileNotFoundError:
            raise InputError(f"{os.fspath(image)}: no such image file; check the path") from None
        except IsADirectoryError:
            raise InputError(f"{os.fspath(image)} is a folder; name its files") from None
        except InputError as error:
            raise InputError(f"{os.fspath(image)}: {error}") from error
        except OSError as error:
            raise InputError(f"{os.fspath(image)}: cannot be read ({error.strerror})") from error
    array = np.asarray(image)
    rgb = array.ndim == 3 and array.shape[-1] == 3
    if array.dtype != np.uint8 or not (rgb or array.ndim == 2) or array.size == 0:
        raise InputError(
            f"image is a {array.dtype} array of shape {array.shape}: expected uint8 "
            "[H,W,3], [H,W] or [B,H,W,3] with values 0..255, not normalised"
        )
    return Image.fromarray(array).convert("RGB")
