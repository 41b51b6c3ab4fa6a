"""Confusions, calibration and the worst mistakes on the page: right numbers, own colours, nothing fetched."""

from __future__ import annotations

import random

import example_run
import numpy as np

from peftcli.data.images.sheet import data_uri
from peftcli.reports import answers, page

PIXELS = data_uri(np.full((8, 8, 3), 99, np.uint8))
FOUND = {
    "confusion": {"labels": ["crack", "good", "stain"], "counts": [[8, 2, 0], [1, 30, 0], [5, 0, 4]]},
    "reliability": [
        {"confidence": 0.62, "accuracy": 0.5, "rows": 10},
        {"confidence": 0.97, "accuracy": 0.95, "rows": 40},
    ],
    "worst": [
        {"row": 7, "expected": "stain", "predicted": "crack", "score": 0.987, "picture": PIXELS},
        {"row": 9, "expected": "<b>", "predicted": '"><script>alert(1)</script>', "score": 0.7, "picture": PIXELS},
        {"row": 1, "expected": "a", "predicted": "b", "score": 0.6, "picture": "https://example.org/x.png"},
        {"row": 2, "expected": "a", "predicted": "b", "score": 0.6, "picture": f'{PIXELS}" onerror="alert(1)'},
        {"row": 3, "expected": "a", "predicted": "b", "score": 0.6},
    ],
}


def test_captions_name_what_the_numbers_say():
    confusion, reliability = answers.figures(FOUND)
    assert "42 of 50 are right" in confusion.caption
    assert "stain was taken for crack: 5 of 9" in confusion.caption
    for name in ("crack", "good", "stain", ">30<", ">8<"):
        assert name in confusion.svg
    assert "4.0 %" in reliability.caption  # (10 * 0.12 + 40 * 0.02) / 50
    assert "surer than it is right" in reliability.caption
    assert all("var(--tuned)" in figure.svg and "#0000" not in figure.svg for figure in (confusion, reliability))


def test_parts_that_are_not_there_are_not_drawn():
    assert answers.figures({}) == []
    assert answers.worst({}) == []
    many = [str(i) for i in range(60)]
    assert answers.figures({"confusion": {"labels": many, "counts": np.eye(60, dtype=int).tolist()}}) == []


def test_a_class_without_rows_and_perfect_answers():
    (figure,) = answers.figures({"confusion": {"labels": ["a", "b"], "counts": [[4, 0], [0, 0]]}})
    assert "4 of 4 are right" in figure.caption
    assert "taken for" not in figure.caption


def test_the_page_carries_pictures_inside_and_only_those(run):
    before = page.write(run).read_text()
    assert "img-src" not in before
    assert "<img" not in before
    quality = example_run.report(random.Random(0))["quality"]
    example_run.edit(run, quality={**quality, "answers": FOUND})
    html = page.write(run).read_text()
    assert "img-src data:;" in html
    assert html.count("<img ") == 2
    assert "example.org" not in html
    assert "<script>alert" not in html
    assert "Worst mistakes" in html
    assert "row 7" in html
    assert "score 98.7\u00a0%" in html
    assert html == page.write(run).read_text()
