"""A sheet holds every tile whole, in order, with its edge and caption."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from peftcli.data.images import sheet
from peftcli.data.images.sheet import COLOURS, EDGE, GAP, LINE, Tile


def plain(height: int, width: int, value: int = 200) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def test_tiles_in_reading_order_with_their_edges():
    tiles = [
        Tile(plain(50, 50, 10 * i), f"row {i}\nlabel", mark) for i, mark in enumerate(["", "right", "wrong", "odd"] * 3)
    ]
    found = sheet.contact_sheet(tiles, side=40, columns=5)
    wide, high = 40 + 2 * EDGE + GAP, 40 + 2 * EDGE + GAP + 2 * LINE
    assert found.size == (5 * wide + GAP, 3 * high + GAP)
    for place, tile in enumerate(tiles):
        left, top = GAP + place % 5 * wide, GAP + place // 5 * high
        assert "#{:02x}{:02x}{:02x}".format(*found.getpixel((left, top))) == COLOURS[tile.mark]
        assert found.getpixel((left + 24, top + 24)) == (10 * place,) * 3
        caption = np.array(found.crop((left, top + 48, left + 48, top + 48 + 2 * LINE)))
        assert caption.min() < 128
    assert sheet.png(found) == sheet.png(sheet.contact_sheet(tiles, side=40, columns=5))


def test_any_shape_fits_whole():
    for shape in ((1, 5000), (5000, 1), (1, 1), (8, 8), (300, 200)):
        small = sheet.fitted(plain(*shape), 64)
        assert max(small.size) == 64
        assert min(small.size) >= 1
        sheet.contact_sheet([Tile(plain(*shape), "a caption that is far too long for its tile " * 3)])
    with pytest.raises(ValueError, match="at least one"):
        sheet.contact_sheet([])


def test_a_thumbnail_as_text():
    pixels = np.arange(300 * 200 * 3, dtype=np.uint32).reshape(300, 200, 3).astype(np.uint8)
    text = sheet.data_uri(pixels)
    kind, _, data = text.partition(",")
    assert kind == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (64, 96)
    small = sheet.data_uri(plain(8, 8))
    assert Image.open(io.BytesIO(base64.b64decode(small.partition(",")[2]))).size == (8, 8)
