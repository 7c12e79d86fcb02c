"""Image files of all kinds and modes, common and rare, readable and not."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from deit_jax.pictures import KINDS
from tests.data.conftest import encode, picture

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F")
HEIGHT, WIDTH = 30, 40
_LOSSLESS_JPEG = bytes.fromhex(  # grey, 4×4, written by libjpeg-turbo 3
    "ffd8ffc4001700010101010000000000000000000000000002030108ffc3000b080004000401001100"
    "ffda0008010000060000e7fddda24a892a2480ffd9"
)


def _png(pixels, colour_type, *, bits=8, interlaced=False, size=None):
    """Pillow writes 16 bits for grey images only, and never interlaces."""

    def chunk(name, content):
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    adam7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2))
    passes = (*adam7, (1, 0, 2, 1)) if interlaced else ((0, 0, 1, 1),)
    parts = [pixels[top::down, left::right] for top, left, down, right in passes]
    rows = b"".join(b"\0" + r.astype(f">u{bits // 8}").tobytes() for part in parts for r in part)
    height, width = size or pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, interlaced)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(chunk, chunks, chunks.values()))


def _bmp(bits, compression, rows, *, palette=b"", height=HEIGHT):
    """Pillow writes neither 4 nor 16 bits, no run lengths, and from the bottom to the top alone."""
    info = (40, WIDTH, height, 1, bits, compression, len(rows), 0, 0, len(palette) // 4, 0)
    header = struct.pack("<IiiHHIIiiII", *info) + palette
    start = 14 + len(header)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + header + rows


def _jpeg_of_size(content, height, width):
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">HH", height, width) + content[at + 4 :]


def _kinds_and_modes():
    """All that Pillow writes of KINDS × modes."""
    colour = Image.fromarray(picture(0, HEIGHT, WIDTH))
    translucent = colour.copy()
    translucent.putalpha(colour.convert("L"))
    for mode in _MODES:
        source = translucent if mode in ("LA", "RGBA", "PA") else colour
        if mode in ("I", "I;16", "F", "LA"):
            source = source.convert("LA" if mode == "LA" else "L")
        image = Image.new(mode, colour.size) if mode == "LAB" else source.convert(mode)
        for kind in KINDS:
            try:
                yield f"{kind} {mode}", encode(image, kind)
            except (OSError, ValueError, KeyError):
                continue


def _special():
    rng = np.random.default_rng(0)
    colour = Image.fromarray(picture(0, HEIGHT, WIDTH))
    other = Image.fromarray(picture(1, HEIGHT, WIDTH))
    grey, palette, translucent = colour.convert("L"), colour.quantize(16), colour.copy()
    translucent.putalpha(grey)
    words = rng.integers(0, 2**16, (HEIGHT, WIDTH, 4))
    indices = rng.integers(0, 256, HEIGHT * WIDTH, np.uint8).tobytes()
    colours = rng.integers(0, 256, 1024, np.uint8).tobytes()
    rotated = Image.Exif()
    rotated[0x0112] = 6  # "rotate me": the reference does not
    cmyk = encode(
        Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 4), np.uint8), "CMYK"), "JPEG"
    )
    adobe = cmyk.index(b"\xff\xee\0\x0eAdobe")

    def film(kind, first=colour, **options):
        # Copies, since Pillow stores settings of the last encoder in the image.
        frames = {"save_all": True, "append_images": [other.copy()]}
        return encode(first.copy(), kind, **frames, **options)

    png = encode(colour, "PNG")
    broken_checksum = png[:-16] + bytes([png[-16] ^ 1]) + png[-15:]  # of the pixels
    return {
        "CMYK JPEG of noise": cmyk,
        "CMYK JPEG without Adobe's marker": cmyk[:adobe] + cmyk[adobe + 16 :],
        "YCCK JPEG": cmyk[: adobe + 15] + b"\2" + cmyk[adobe + 16 :],
        "RGB JPEG that is not YCbCr": encode(colour, "JPEG", keep_rgb=True),
        "progressive JPEG": encode(colour, "JPEG", progressive=True),
        "progressive grey JPEG": encode(grey, "JPEG", progressive=True),
        "JPEG of 4:4:4": encode(colour, "JPEG", subsampling=0),
        "JPEG of 4:2:2": encode(colour, "JPEG", subsampling=1),
        "JPEG with restarts": encode(colour, "JPEG", restart_marker_blocks=2, optimize=True),
        "JPEG turned by EXIF": encode(colour, "JPEG", exif=rotated),
        "JPEG and more": encode(colour, "JPEG") + b"another file",
        "two JPEGs as a camera stores them": film("MPO"),
        "JPEG whose data end early": encode(colour, "JPEG")[:-100] + b"\xff\xd9",
        "one pixel": encode(Image.fromarray(picture(1, 1, 1)), "JPEG"),
        "very wide": encode(Image.fromarray(picture(2, 3, 20_000)), "JPEG"),
        "PNG of 16 bits": _png(words[..., :3], 2, bits=16),
        "PNG of 16 bits with alpha": _png(words, 6, bits=16),
        "grey PNG of 16 bits with alpha": _png(words[..., :2], 4, bits=16),
        "interlaced PNG": _png(picture(2, HEIGHT, WIDTH), 2, interlaced=True),
        "interlaced PNG with alpha": _png(words % 256, 6, interlaced=True),
        "palette of 2 bits": encode(colour.quantize(4), "PNG", bits=2),
        "palette of 4 bits": encode(palette, "PNG", bits=4),
        "palette with a transparent colour": encode(palette, "PNG", transparency=3),
        "palette with alpha": encode(translucent.quantize(16), "PNG"),
        "grey with a transparent value": encode(grey, "PNG", transparency=100),
        "colour with a transparent colour": encode(colour, "PNG", transparency=(9, 9, 9)),
        "PNG turned by EXIF": encode(colour, "PNG", exif=rotated),
        "animated PNG": film("PNG"),
        "animated PNG after a still": film("PNG", default_image=True),
        "animated PNG with alpha": film("PNG", translucent, disposal=1, blend=1),
        "PNG without its end": png[:-12],
        "PNG and more": png + b"another file",
        "PNG with a wrong checksum": broken_checksum,
        "transparent GIF": encode(palette, "GIF", transparency=3),
        "interlaced GIF": encode(palette, "GIF", interlace=1),
        "animated GIF": film("GIF", palette),
        "BMP of 4 bits": _bmp(4, 0, indices[: HEIGHT * WIDTH // 2], palette=colours[:64]),
        "BMP of 16 bits": _bmp(16, 0, indices + indices),
        "BMP of run lengths": _bmp(8, 1, b"\x28\x05\0\0" * HEIGHT + b"\0\1", palette=colours),
        "BMP from the top": _bmp(8, 0, indices, palette=colours, height=-HEIGHT),
        "lossless WebP with alpha": encode(translucent, "WEBP", lossless=True),
        "animated WebP": film("WEBP"),
        "TIFF turned by EXIF": encode(colour, "TIFF", exif=rotated),
        "TIFF of LZW": encode(colour, "TIFF", compression="tiff_lzw"),
        "TIFF of JPEG": encode(colour, "TIFF", compression="jpeg"),
        "TIFF of two pages": film("TIFF"),
        "animated AVIF": film("AVIF"),
        "black PPM, which ends with zeros": b"P5 2 1 255 " + bytes(2),
        "PPM in text": b"P3 2 1 255 1 2 3 4 5 6\n",
        "PPM of 16 bits": b"P6 2 1 65535 " + bytes(range(12)),
    }


def _unreadable():
    colour = Image.fromarray(picture(0, HEIGHT, WIDTH))
    jpeg, grey = encode(colour, "JPEG"), encode(colour.convert("L"), "JPEG")
    png = encode(colour, "PNG")
    return {
        "empty": b"",
        "one byte": b"\xff",
        "text": b"not an image, but longer than any header is",
        "text that begins as a BMP": b"BMI, the body mass index, is a number",
        "ICO": encode(colour, "ICO"),
        "TGA": encode(colour, "TGA"),
        "PDF": b"%PDF-1.7\n",
        "EPS": encode(colour, "EPS"),
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        "grey PNG of 16 bits": encode(Image.new("I;16", (4, 4), 300), "PNG"),
        "grey PPM of 16 bits": b"P5 2 1 65535 " + bytes(4),
        "JPEG cut short": jpeg[:-50],
        "JPEG cut in its header": jpeg[:200],
        "lossless JPEG": _LOSSLESS_JPEG,
        **{f"JPEG of zeros from byte {n}": jpeg[:n] + bytes(3000) for n in range(640, 660)},
        "progressive JPEG cut short": encode(colour, "JPEG", progressive=True)[:-200],
        "CMYK JPEG cut short": encode(colour.convert("CMYK"), "JPEG")[:-50],
        "PNG cut short": png[:-100],
        "PNG with a broken header": png[:16] + b"\1" + png[17:],
        "GIF cut short": encode(colour, "GIF")[:-300],
        "BMP cut short": encode(colour, "BMP")[:-300],
        "WebP cut short": encode(colour, "WEBP")[:-50],
        "TIFF cut short": encode(colour, "TIFF")[:-300],
        "JPEG of too many pixels": _jpeg_of_size(jpeg, 13378, 13378),
        "grey JPEG of too many pixels": _jpeg_of_size(grey, 13378, 13378),
        "PNG of too many pixels": _png(np.zeros((1, 1, 3)), 2, size=(13378, 13378)),
        "PPM of too many pixels": b"P6 13378 13378 255 ",
    }


def _of_many_bits(content):
    return Image.open(io.BytesIO(content)).mode.startswith(("I", "F"))


_WRITTEN = dict(_kinds_and_modes())
READABLE = {n: c for n, c in _WRITTEN.items() if not _of_many_bits(c)} | _special()
UNREADABLE = {n: c for n, c in _WRITTEN.items() if _of_many_bits(c)} | _unreadable()
