"""What `peft data` says of pictures: planted copies, flips, broken and odd files are counted and named."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from peftcli.data.images import survey
from peftcli.data.rows import Rows
from peftcli.data.sampler import generator


def picture(label: str, seed: int) -> Image.Image:
    """Round things or square things of many colours and places."""
    draw = generator("thing", label, seed)
    image = Image.new("RGB", (48, 48), tuple(draw.integers(200, 256, 3).tolist()))
    pen, ink = ImageDraw.Draw(image), tuple(draw.integers(0, 120, 3).tolist())
    for _ in range(3):
        x, y = draw.integers(0, 30, 2).tolist()
        side = int(draw.integers(8, 18))
        (pen.ellipse if label == "round" else pen.rectangle)((x, y, x + side, y + side), ink)
    return image


def png(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def rows(start: int, count: int, *more: tuple[bytes, str]) -> Rows:
    names = ["round", "square"]
    made = [(png(picture(names[i % 2], i)), names[i % 2]) for i in range(start, start + count)] + list(more)
    return Rows.from_list(
        [
            {"image": {"bytes": data, "path": f"{i}.png"}, "label": label, "row": i}
            for i, (data, label) in enumerate(made)
        ]
    )


@pytest.fixture(scope="module")
def found():
    copied, again = png(picture("round", 2), "JPEG"), png(picture("square", 5))
    train = rows(0, 40, (again, "round"), (png(picture("round", 90).convert("L")), "round"))
    test = rows(100, 10, (copied, "round"), (again, "square"), (again[:80], "square"), (b"no picture", "round"))
    return survey.describe({"train": train, "test": test}, lambda cell: (str(cell),))


def test_counts_sizes_and_oddities(found):
    about, _ = found
    train, test = about["splits"]["train"], about["splits"]["test"]
    assert (train["rows"], test["rows"]) == (42, 14)
    assert train["labels"] == {"round": 22, "square": 20}
    assert (train["width"]["min"], train["height"]["max"]) == (48, 48)
    assert train["oddities"] == {"grey": 1}


def test_broken_pictures_are_named(found):
    problems = found[0]["problems"]
    assert set(problems) == {"test"}
    assert [(p["row"], p["name"]) for p in problems["test"]] == [(12, "12.png"), (13, "13.png")]
    assert problems["test"][0]["kind"] in ("truncated", "damaged")
    assert problems["test"][1]["kind"] == "not-an-image"


def test_copies_within_and_across_splits(found):
    about, _ = found
    tables = {(t["split"], t["against"]): (t["equal"], t["near"]) for t in about["duplicates"]}
    assert tables == {("train", "train"): (1, 0), ("test", "train"): (1, 1), ("test", "test"): (0, 0)}
    across = next(t for t in about["duplicates"] if t["split"] == "test" and t["against"] == "train")
    assert [(e["row"], e["other"]) for e in across["examples"]] == [(11, 5), (10, 2)]
    assert about["leakage"] == ["1 of 14 test pictures are equal to a training picture, 1 more nearly so"]
    assert about["conflicts"]["pictures"] == 1
    assert about["conflicts"]["examples"][0]["rows"][1] == {"split": "train", "row": 40, "label": "round"}


def test_a_planted_flip_is_doubted_and_shown(found):
    about, sheets = found
    assert ("train", 40, "square") in [(s["split"], s["row"], s["likelier"]) for s in about["suspects"]["examples"]]
    assert set(sheets) >= {"classes", "copies across splits"}
    for data in sheets.values():
        assert np.asarray(Image.open(io.BytesIO(data))).ndim == 3


def test_several_labels_a_row_raise_no_doubts():
    about, _ = survey.describe({"train": rows(0, 6)}, lambda cell: (str(cell), "both"))
    assert about["suspects"] == {"rows": 0, "examples": []}
    assert about["splits"]["train"]["labels"]["both"] == 6
    assert about["leakage"] == []


def test_no_picture_can_be_read():
    bad = Rows.from_list([{"image": {"bytes": b"x", "path": "a"}, "label": "a", "row": 0}])
    about, sheets = survey.describe({"train": bad}, lambda cell: (str(cell),))
    assert len(about["problems"]["train"]) == 1
    assert sheets == {}
