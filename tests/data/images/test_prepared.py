"""Decoded pictures are kept by content, found again, and bad ones named."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from peftcli.data.images import places, prepared
from peftcli.data.rows import Rows
from peftcli.models.image_reader import ImageReader
from tests import pictures

READER = ImageReader("tiny", 16, 16)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """One of its own for each test."""
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pictures"


@pytest.fixture
def rows(tmp_path) -> Rows:
    folder = pictures.make_folder(tmp_path, {"good": 3, "bad": 2})
    (folder / "bad" / "000.png").write_bytes((folder / "bad" / "000.png").read_bytes()[:200])
    files = sorted(folder.rglob("*.png"))
    return Rows.from_list([{"image": {"bytes": file.read_bytes(), "path": file.name}} for file in files])


def prepare(rows: Rows, reader: ImageReader = READER) -> prepared.Prepared:
    return prepared.prepare(rows, reader.fit, reader.size, reader.fingerprint)


def test_what_is_kept_is_what_was_decoded(rows, monkeypatch) -> None:
    first = prepare(rows)
    assert first.pixels_NSSC.shape == (5, 16, 16, 3)
    assert {place: problem.kind for place, problem in first.problems.items()} == {0: "truncated"}
    assert np.array_equal(first.pixels_NSSC[1], READER.fit(pictures.draw("bad", 1)))
    monkeypatch.setattr(prepared, "look", None)  # nothing is decoded again
    again = prepare(rows)
    assert np.array_equal(again.pixels_NSSC, first.pixels_NSSC)
    assert str(again.problems[0]) == str(first.problems[0])


def test_another_size_or_other_pictures_are_kept_apart(rows) -> None:
    prepare(rows)
    assert prepare(rows, ImageReader("tiny", 8, 8)).pixels_NSSC.shape == (5, 8, 8, 3)
    assert len(prepare(rows[1:]).pixels_NSSC) == 4


def test_a_damaged_file_of_the_cache_is_made_anew(rows, caplog) -> None:
    first = prepare(rows)
    path = next((prepared.paths.cache() / "pictures").glob("*.json"))
    for file in path.parent.glob("*.json"):
        file.write_text("{")
    assert np.array_equal(prepare(rows).pixels_NSSC, first.pixels_NSSC)
    assert "damaged" in caplog.text


def test_of_too_many_it_is_kept_which_are_of_no_use(rows, monkeypatch) -> None:
    monkeypatch.setattr(prepared, "MOST_BYTES", 1000)
    first = prepare(rows)
    assert first.pixels_NSSC is None
    assert {place: problem.kind for place, problem in first.problems.items()} == {0: "truncated"}
    monkeypatch.setattr(prepared, "look", None)  # nothing is decoded again
    assert list(prepare(rows).problems) == [0]


def test_a_picture_that_is_drawn_over_is_decoded_anew(tmp_path) -> None:
    """Of the same size, and alike in what its row's `id` is made of."""
    file = tmp_path / "camera.bmp"
    pixels_HWC = np.zeros((300, 300, 3), np.uint8)
    for value in (0, 255):
        pixels_HWC[140:160] = value
        Image.fromarray(pixels_HWC).save(file)
        os.utime(file, ns=(value, value))
        row = {"bytes": None, "path": file.name, "file": str(file), "id": places._identity(file)}
        found = prepare(Rows.from_list([{"image": row}])).pixels_NSSC
        assert np.array_equal(found[0], READER.fit(pixels_HWC))


def test_a_full_disk_is_told_and_nothing_is_kept(rows, cache, monkeypatch, caplog) -> None:
    monkeypatch.setattr(prepared.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    assert prepare(rows).pixels_NSSC.any()
    assert "No space left" in caplog.text
    assert not list(cache.iterdir())


def test_what_was_read_last_is_kept(rows, cache, monkeypatch) -> None:
    prepare(rows[:2])
    [one] = cache.glob("*.npy")
    prepare(rows[2:4])
    for at, file in enumerate((one, *(set(cache.glob("*.npy")) - {one}))):
        os.utime(file, (at, at))
    prepare(rows[:2])
    monkeypatch.setattr(prepared, "MOST_KEPT", 2 * one.stat().st_size)
    prepare(rows[1:3])
    assert one.is_file()
    assert len(list(cache.glob("*.npy"))) == len(list(cache.glob("*.json"))) == 2
