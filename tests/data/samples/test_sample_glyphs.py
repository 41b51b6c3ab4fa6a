"""Characters drawn from matplotlib's fonts: many classes, none of them twice, the same every time."""

from __future__ import annotations

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from peftcli.data.samples import glyphs


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glyphs")
    about = glyphs.convert(folder, folder)
    found = pq.read_table(folder / "train.parquet").to_pylist()
    assert about["rows"]["train"] == len(found)
    assert set(about["fonts"]) == set(glyphs.FONTS)
    assert "Bitstream Vera" in (folder / "LICENSE").read_text()
    return found


def test_there_are_hundreds_of_classes_of_eight_pictures_or_more(rows) -> None:
    labels, counts = np.unique([row["label"] for row in rows], return_counts=True)
    assert len(labels) > 500
    assert counts.min() >= glyphs.LEAST
    assert {row["alphabet"] for row in rows} == set(glyphs.ALPHABETS)
    assert len({row["name"] for row in rows}) == len(rows)
    assert not {label for label in labels if chr(int(label, 16)).isdigit()}


def test_pictures_are_ink_on_paper_and_differ_by_font(rows) -> None:
    some = [row for row in rows if row["label"] == "0041"]
    pixels = [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in some]
    assert {one.shape for one in pixels} == {(glyphs.SIDE, glyphs.SIDE)}
    assert all(one[0, 0] == 255 and one.min() < 60 for one in pixels)
    assert len({one.tobytes() for one in pixels}) == len(pixels)


def test_letters_that_look_the_same_in_two_scripts_are_one_class(rows) -> None:
    labels = {row["label"] for row in rows}
    assert "0041" in labels
    assert not {"0391", "0410"} & labels  # Greek and Cyrillic capitals that look like A
    assert {"03A9", "0416"} <= labels
