"""Draws a sheet of pictures with captions."""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN = 8  # pixels around and between the tiles
MIN_SIDE = 160  # smaller images are enlarged by whole factors
_LETTER = 0.55  # width of most letters, in heights of the font
_FONTS = ("DejaVuSans.ttf", "Arial.ttf")  # Pillow's own font has no accents


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
    letters = int(width / (_LETTER * size))
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, letters)]
    picture = Image.new("RGB", (width, (size + 4) * len(lines)), "white")
    for number, line in enumerate(lines):
        place = (0, (size + 4) * number)
        ImageDraw.Draw(picture).text(place, line, font=_font(size), fill="black")
    return picture


def _font(size: int) -> ImageFont.FreeTypeFont:
    for name in _FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)
