"""Copies are found under other encodings, sizes and light; other pictures are not."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from peftcli.data.images import decode
from peftcli.data.images.likeness import Pair, Print, closest, fingerprint
from peftcli.data.images.likeness import pairs as all_pairs
from peftcli.data.sampler import generator


def drawing(seed: int, side: int = 120) -> np.ndarray:
    """Shapes of random colours and places."""
    draw = generator("drawing", seed)
    image = Image.new("RGB", (side, side), tuple(draw.integers(0, 256, 3).tolist()))
    pen = ImageDraw.Draw(image)
    for _ in range(8):
        left, top = draw.integers(0, side - 20, 2).tolist()
        wide, high = draw.integers(15, side // 2, 2).tolist()
        shape = pen.ellipse if draw.random() < 0.5 else pen.rectangle
        shape((left, top, left + wide, top + high), tuple(draw.integers(0, 256, 3).tolist()))
    return np.array(image)


def encoded(pixels: np.ndarray, form: str, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, quality=quality)
    return decode.read(buffer.getvalue())


def resized(pixels: np.ndarray, share: float) -> np.ndarray:
    side = round(len(pixels) * share)
    return np.array(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))


CHANGES = {
    "jpeg": lambda p: encoded(p, "JPEG", 60),
    "webp": lambda p: encoded(p, "WEBP", 60),
    "smaller": lambda p: resized(p, 0.5),
    "larger": lambda p: resized(p, 1.7),
    "darker": lambda p: np.array(ImageEnhance.Brightness(Image.fromarray(p)).enhance(0.8)),
    "flatter": lambda p: np.array(ImageEnhance.Contrast(Image.fromarray(p)).enhance(0.7)),
}
ORIGINALS = [drawing(seed) for seed in range(120)]


def near(prints: list[Print]) -> list[Pair]:
    return list(all_pairs(prints))


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_copy_is_found_and_nothing_else(name):
    copies = [CHANGES[name](picture) for picture in ORIGINALS[:40]]
    pairs = near([fingerprint(picture) for picture in ORIGINALS + copies])
    found, planted = {(p.first, p.second) for p in pairs}, {(i, 120 + i) for i in range(40)}
    assert found <= planted
    assert len(found) >= 39
    assert all(0.97 <= p.similarity < 1 for p in pairs)


def test_equal_pixels_are_told_from_nearly_equal_ones():
    touched = ORIGINALS[0].copy()
    touched[0, 0] ^= 1
    pairs = near([fingerprint(picture) for picture in (ORIGINALS[0], ORIGINALS[0].copy(), touched)])
    assert [(p.first, p.second, p.similarity) for p in pairs] == [(0, 1, 1.0), (0, 2, 0.999), (1, 2, 0.999)]


def test_clocks_that_differ_in_their_hands_are_no_copies():
    prints = []
    for hour in range(12):
        image = Image.new("RGB", (96, 96), "white")
        pen = ImageDraw.Draw(image)
        pen.ellipse((4, 4, 92, 92), "#dddddd", "black", 4)
        x, y = 48 + 30 * np.sin(hour * np.pi / 6), 48 - 30 * np.cos(hour * np.pi / 6)
        pen.line((48, 48, x, y), "black", 6)
        prints.append(fingerprint(np.array(image)))
    assert near(prints) == []


def test_pictures_of_one_colour_are_compared_by_it():
    plain = [np.full((30, 30, 3), value, np.uint8) for value in (0, 0, 90, 255)]
    pairs = near([fingerprint(picture) for picture in plain])
    assert [(p.first, p.second) for p in pairs] == [(0, 1)]
    assert near([]) == []


def test_the_closest_of_each_group_are_those_of_all_pairs():
    draw = generator("groups")
    prints = [fingerprint(drawing(seed) ^ draw.integers(0, 2, (120, 120, 3), np.uint8)) for seed in [0, 1, 2, 1] * 150]
    groups = draw.integers(0, 3, len(prints)).tolist()
    best: dict[tuple[int, int], Pair] = {}
    for pair in near(prints):
        key = (pair.second, groups[pair.first])
        if key not in best or pair.similarity > best[key].similarity:
            best[key] = pair
    found = closest(prints, groups)
    assert {(p.second, groups[p.first]): p.similarity for p in found} == {k: p.similarity for k, p in best.items()}
    assert len(found) > 1700
    assert closest([], []) == []


def test_a_camera_that_sees_one_thing_again_and_again_is_no_ordeal():
    """All pairs of hashes are close; looked at one by one they took minutes."""
    draw = generator("camera")
    base = np.kron(draw.integers(40, 200, (6, 6, 3)), np.ones((16, 16, 1), np.int64))
    prints = []
    for _ in range(1500):
        pixels_HWC = base + draw.integers(-6, 7, base.shape)
        top, left = draw.integers(0, 90, 2)
        pixels_HWC[top : top + 4, left : left + 4] = 255
        prints.append(fingerprint(pixels_HWC.clip(0, 255).astype(np.uint8)))
    start = time.process_time()
    closest(prints, [0] * len(prints))
    assert time.process_time() - start < 20


def test_strips_and_single_pixels_have_prints():
    shapes = [(1, 5000), (5000, 1), (1, 1)]
    draw = generator("strips")
    prints = [fingerprint(draw.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]
    assert near(prints) == []


def sample(name: str) -> list[dict]:
    folder = Path(os.environ.get("PEFTCLI_CACHE", Path.home() / ".cache" / "peftcli")) / "samples" / name
    return [row for split in ("train", "test") for row in pq.read_table(folder / f"{split}.parquet").to_pylist()]


@pytest.mark.samples
def test_emoji_that_are_near_are_the_same_drawing():
    """Measured: 37 of 7.1 million pairs of different emoji beside those with equal pixels, all the same figure.

    They are flags, a superhero's sexes, and circles, squares and hearts in orange and yellow.
    """
    rows = sample("emoji-google")
    pairs = near([fingerprint(decode.read(row["image"]["bytes"])) for row in rows])
    other = [p for p in pairs if rows[p.first]["emoji"] != rows[p.second]["emoji"] and p.similarity < 1]
    assert len(other) <= 40
    assert sum(rows[p.first]["fine"] != rows[p.second]["fine"] for p in other) <= 2
