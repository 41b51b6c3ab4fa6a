"""Many pictures on one: thumbnails in rows with a caption and a coloured edge. H, W pixels."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

EDGE = 4
GAP = 8
LINE = 14
COLOURS = {"": "#d8d4c8", "right": "#19683b", "wrong": "#ad1f1a", "odd": "#a8480a"}


@dataclass(frozen=True)
class Tile:
    """One picture of a sheet.

    Attributes:
        pixels_HWC: RGB, uint8 [H, W, 3].
        caption: At most two lines that are shown; what does not fit is cut.
        mark: Colour of the edge.
    """

    pixels_HWC: np.ndarray
    caption: str = ""
    mark: Literal["", "right", "wrong", "odd"] = ""


def contact_sheet(tiles: Sequence[Tile], side: int = 112, columns: int = 8) -> Image.Image:
    """The tiles in reading order, each picture whole within a square of `side` pixels.

    Raises:
        ValueError: There are no tiles.
    """
    if not tiles:
        raise ValueError("a contact sheet needs at least one picture")
    columns = min(columns, len(tiles))
    wide, high = side + 2 * EDGE + GAP, side + 2 * EDGE + GAP + 2 * LINE
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * wide + GAP, rows * high + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for place, tile in enumerate(tiles):
        left, top = GAP + place % columns * wide, GAP + place // columns * high
        outer = side + 2 * EDGE
        draw.rectangle((left, top, left + outer - 1, top + outer - 1), COLOURS[tile.mark])
        draw.rectangle((left + EDGE, top + EDGE, left + outer - EDGE - 1, top + outer - EDGE - 1), "#f2f0e8")
        small = fitted(tile.pixels_HWC, side)
        sheet.paste(small, (left + (outer - small.width) // 2, top + (outer - small.height) // 2))
        for line, text in enumerate(tile.caption.splitlines()[:2]):
            draw.text((left, top + outer + line * LINE), _cut(text, font, outer), fill="#1c2328", font=font)
    return sheet


def fitted(pixels_HWC: np.ndarray, side: int) -> Image.Image:
    """The picture whole in a square of `side` pixels, its proportions kept; small ones grow by whole pixels."""
    image = Image.fromarray(pixels_HWC)
    share = side / max(image.size)
    size = max(1, round(image.width * share)), max(1, round(image.height * share))
    return image.resize(size, Image.Resampling.NEAREST if share > 1 else Image.Resampling.BOX)


def png(image: Image.Image) -> bytes:
    """The picture as a PNG file, equal bytes for equal pixels."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_uri(pixels_HWC: np.ndarray, side: int = 96) -> str:
    """A thumbnail that can stand in an HTML page or a JSON file: a PNG as `data:image/png;base64,...`."""
    image = Image.fromarray(pixels_HWC)
    if max(image.size) > side:
        image = fitted(pixels_HWC, side)
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
