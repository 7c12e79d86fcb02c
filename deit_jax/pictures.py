"""Opens image files as the PyTorch reference does: `PIL.Image.open(file).convert("RGB")`.

Says which kinds of files are images at all, for training, evaluation and prediction alike. Refuses
what training cannot read to the same pixels, and what the reference turns white.
"""

import re
from typing import IO

from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from deit_jax.errors import InputError, brief

# How a file of each kind begins; the names are Pillow's.
_SIGNATURES = re.compile(
    rb"(?P<JPEG>\xff\xd8\xff)"
    rb"|(?P<PNG>\x89PNG\r\n\x1a\n)"
    rb"|(?P<GIF>GIF8[79]a)"
    rb"|(?P<BMP>BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0)"
    rb"|(?P<WEBP>RIFF.{4}WEBPVP8)"
    rb"|(?P<TIFF>II[*+]\0|MM\0[*+])"
    rb"|(?P<PPM>P[1-6][\s#])"
    rb"|(?P<AVIF>.{4}ftypavi[fs])"
    rb"|(?P<JPEG2000>\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n)",
    re.DOTALL,
)
KINDS = tuple(_SIGNATURES.groupindex)
SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".gif", ".bmp", ".webp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2"),
)
FIRST_BYTES = 18  # so many tell the kind
MOST_RESIZED = 2**25  # pixels, 100 MB: a picture of 4000×1 would become one of 1,024,000×256
USUAL_ASPECT = 16  # up to which only the model's size decides


def kind(first: bytes) -> str | None:
    """Returns the one of KINDS that a file is by its first bytes, or None if it is none of them."""
    found = _SIGNATURES.match(first)
    return found and found.lastgroup


def read(file: IO[bytes]) -> Image.Image:
    """Reads an image file of one of KINDS; of several pictures in it, the first.

    Args:
      file: a file at its start, which must be seekable.

    Returns:
      The picture in mode RGB: EXIF orientation is ignored and alpha is dropped.

    Raises:
      InputError: the reason, without the file's name: another kind of file, damaged data, more than
        179 million pixels, a lossless JPEG, or a mode that `to_rgb` refuses.
    """
    first = file.read(FIRST_BYTES)
    found = kind(first)
    if found is None:
        begins = f"begins with {first[:8]!r}" if first else "is empty"
        raise InputError(f"the file {begins}, expected {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    file.seek(0)
    try:
        with Image.open(file, formats=[found]) as image:
            if found == "JPEG":
                _check_jpeg(image, file)
            image.info.pop("transparency", None)  # has no effect, but Pillow may warn of it
            return to_rgb(image)
    except (InputError, MemoryError):
        raise
    except UnidentifiedImageError:  # whose text names an object in memory
        raise InputError(f"cannot be read as {found}: Pillow makes nothing of its header") from None
    except Exception as error:  # Pillow's decoders raise all sorts for damaged files
        raise InputError(f"cannot be read as {found}: {brief(error)}") from error


def check_resized(width: int, height: int, short: int) -> None:
    """Refuses a picture that is nearly a line, of which resizing makes gigabytes.

    Args:
      width: in pixels.
      height: in pixels.
      short: what its short side is resized to.

    Raises:
      InputError: it would have more than `MOST_RESIZED` pixels and `USUAL_ASPECT`.
    """
    long = short * max(width, height) // min(width, height)
    if long > USUAL_ASPECT * short and long * short > MOST_RESIZED:
        raise InputError(
            f"a picture of {width:,}×{height:,} pixels, which would be resized to a side of "
            f"{long:,}; cut it"
        )


def _check_jpeg(image: JpegImageFile, file: IO[bytes]) -> None:
    """Refuses what training's decoder cannot read, although Pillow can."""
    if not image.quantization:
        raise InputError("a lossless JPEG, expected an ordinary one; save it as PNG")
    file.seek(0)
    _, _, scans = file.read().partition(b"\xff\xda")
    if b"\xff\xd9" not in scans:
        raise InputError("the end of the JPEG is missing")


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts a picture to mode RGB.

    Raises:
      InputError: pixels of more than eight bits, of which Pillow makes white.
    """
    if image.mode.partition(";")[0] in ("I", "F"):
        raise InputError(
            f"a grey picture of more than eight bits (mode {image.mode}), expected eight: the "
            "reference turns nearly all of it white; convert it"
        )
    return image.convert("RGB")
