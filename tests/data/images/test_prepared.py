"""Decoded pictures are kept by content, found again, and bad ones named."""

from __future__ import annotations

import numpy as np
import pytest

from peftcli.data.images import prepared
from peftcli.data.rows import Rows
from peftcli.models.image_reader import ImageReader
from tests import pictures

READER = ImageReader("tiny", 16, 16)


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


def test_too_many_are_decoded_as_they_are_needed(rows, monkeypatch) -> None:
    monkeypatch.setattr(prepared, "MOST_BYTES", 1000)
    assert prepare(rows).pixels_NSSC is None
