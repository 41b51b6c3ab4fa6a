"""The figure of experts by domain: domains that chose alike stand together and join first."""

from __future__ import annotations

import pytest

from peftcli.reports import answers, experts

TASKS = {
    "cells": [[0.8, 0.1, 0.1], [0.6, 0.3, 0.1]],
    "emoji": [[0.1, 0.2, 0.7]],
    "digits": [[0.6, 0.2, 0.2], [0.8, 0.2, 0.0]],
    "icons": [[0.15, 0.1, 0.75]],
}


def test_the_tree_joins_the_nearest_first_at_their_mean_distance() -> None:
    rows = [[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.2, 0.8]]
    root = experts.tree(rows)
    assert sorted(root.leaves) == [0, 1, 2, 3]
    assert {frozenset(part.leaves) for part in root.parts} == {frozenset({0, 2}), frozenset({1, 3})}
    assert sorted(part.height for part in root.parts) == pytest.approx([0.1, 0.2])
    assert root.height == pytest.approx((1.0 + 0.8 + 0.9 + 0.7) / 4)


def test_what_is_drawn_is_said() -> None:
    [drawing] = answers.figures({"experts": TASKS})
    assert drawing.title == "Experts that the tasks chose"
    assert "an equal share is 33.3 %" in drawing.caption
    assert "expert 3 on icons, 75.0 %" in drawing.caption
    assert "Most alike choose" in drawing.caption
    assert all(name in drawing.svg for name in TASKS)


@pytest.mark.parametrize(
    "tasks", [{}, {"one": [[0.5, 0.5]]}, {"one": [[1.0]], "two": [[1.0]]}, {"one": [[0.5, 0.5]], "two": [[0.5, 0.5]]}]
)
def test_nothing_to_compare_is_no_figure(tasks) -> None:
    assert answers.figures({"experts": tasks}) == []
