"""Draws a sheet of pictures with captions."""

import contextlib
import functools
import shutil
import subprocess
import textwrap
import unicodedata

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from deit_jax.console import log_error

MARGIN = 8  # pixels around and between the tiles
MIN_SIDE = 160  # smaller images are enlarged by whole factors
_LETTER, _WIDE_LETTER = 0.55, 1.0  # width of most letters, in heights of the font; of Chinese ones
# Pillow's own font has no accents. The others are what macOS and Windows have for other scripts.
_FONTS = (
    *("DejaVuSans.ttf", "Arial.ttf", "Arial Unicode.ttf", "PingFang.ttc", "AppleSDGothicNeo.ttc"),
    *("msyh.ttc", "msgothic.ttc", "malgun.ttf", "Nirmala.ttf"),
)
_NO_LETTER = "\U0010fffe"  # which no font has


def draw(
    tiles: list[np.ndarray | None], captions: list[str], *, title: str, columns: int
) -> Image.Image:
    """Sets square images in a grid, row by row, each over its caption.

    Args:
      tiles: uint8 [S,S,3], all of one size; None leaves a gap.
      captions: a text for each tile; lines that are too long are broken.
      title: of the sheet.
      columns: tiles in a row.
    """
    side = next(len(tile) for tile in tiles if tile is not None)
    side *= -(-MIN_SIDE // side)
    captions = [_text(caption, 14, side) for caption in captions]
    step = side + MARGIN
    heading = _text(title, 18, columns * step - MARGIN)
    top = heading.height + 2 * MARGIN
    row = step + max(caption.height for caption in captions) + MARGIN
    size = (MARGIN + columns * step, top + -(-len(tiles) // columns) * row)
    sheet = Image.new("RGB", size, "white")
    sheet.paste(heading, (MARGIN, MARGIN))
    for place, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        if tile is not None:
            x, y = MARGIN + place % columns * step, top + place // columns * row
            sheet.paste(
                Image.fromarray(tile).resize((side, side), Image.Resampling.NEAREST), (x, y)
            )
            sheet.paste(caption, (x, y + side + 3))
    return sheet


def _text(text: str, size: int, width: int) -> Image.Image:
    """A picture of the text, as wide as given."""
    wide = any(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    letters = int(width / ((_WIDE_LETTER if wide else _LETTER) * size))
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, letters)]
    picture = Image.new("RGB", (width, (size + 4) * len(lines)), "white")
    font = _font(text, size)
    for number, line in enumerate(lines):
        place = (0, (size + 4) * number)
        ImageDraw.Draw(picture).text(place, line, font=font, fill="black")
    return picture


def _font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """The first font here with every letter of a text, else one with most of them, and a note."""
    missing = {}
    for font in _fonts(size):
        missing[font] = "".join(c for c in dict.fromkeys(text) if not _has(font, c))
        if not missing[font]:
            return font
    letters = min(missing.values(), key=len)
    with contextlib.suppress(OSError):
        font = ImageFont.truetype(_by_fontconfig(letters), size)
        if all(_has(font, letter) for letter in text):
            return font
    _note(letters)
    return min(missing, key=lambda font: len(missing[font]))


@functools.cache
def _fonts(size: int) -> list[ImageFont.FreeTypeFont]:
    fonts = []
    for name in _FONTS:
        with contextlib.suppress(OSError):
            fonts.append(ImageFont.truetype(name, size))
    return [*fonts, ImageFont.load_default(size)]


@functools.cache
def _has(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    if letter.isspace():
        return True
    drawn, box = (font.getmask(one) for one in (letter, _NO_LETTER))
    return (drawn.size, bytes(drawn)) != (box.size, bytes(box))


@functools.cache
def _by_fontconfig(letters: str) -> str:
    """The file of a font with these letters, where Linux's fontconfig knows one; else ""."""
    if shutil.which("fc-match") is None:
        return ""
    codes = " ".join(f"{ord(letter):x}" for letter in letters)
    command = ["fc-match", "--format=%{file}", f":charset={codes}"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


@functools.cache
def _note(letters: str) -> None:
    log_error(
        f"note: no font here has the letters {letters}, which are drawn as boxes; install one that "
        "does, such as fonts-noto-cjk or fonts-noto-core"
    )
