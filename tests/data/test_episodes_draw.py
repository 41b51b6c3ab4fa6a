"""Tasks drawn by Meta-Dataset's rules: sizes, limits, chance."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from peftcli.data.episodes import Rules, draw, query_rows
from peftcli.data.sampler import generator

sizes = st.lists(st.integers(2, 60), min_size=2, max_size=30)


def members(counts: list[int]) -> list[np.ndarray]:
    bounds = np.cumsum([0, *counts])
    return [np.arange(a, b) for a, b in itertools.pairwise(bounds)]


@given(sizes, st.integers(2, 8), st.integers(0, 30), st.integers(2, 80), st.integers(1, 12), st.integers(0, 10**6))
@settings(deadline=None)
def test_a_task_keeps_to_the_rules(counts, least, more, support, queries, seed) -> None:
    rules = Rules((least, least + more), support, 20, queries)
    rows = members(counts)
    found = draw(rows, rules, generator(seed))
    assert min(least, len(counts)) <= found.ways <= min(least + more, len(counts))
    assert len(set(found.classes)) == found.ways
    assert not set(found.support) & set(found.query)
    assert len(set(found.support)) == len(found.support)
    per_class = np.bincount(found.query_classes)
    assert (per_class == query_rows(np.array([counts[c] for c in found.classes]), queries)).all()
    assert (np.bincount(found.support_classes, minlength=found.ways) >= 1).all()
    assert len(found.support) <= max(found.ways, support) + found.ways
    for part, classes in ((found.support, found.support_classes), (found.query, found.query_classes)):
        for row, number in zip(part, classes, strict=True):
            assert row in rows[found.classes[number]]


def test_the_same_key_draws_the_same_task_and_another_another() -> None:
    rows, rules = members([20] * 12), Rules((5, 10), 50, 10, 5)
    first, again, other = (draw(rows, rules, generator("episode", key)) for key in (0, 0, 1))
    assert np.array_equal(first.support, again.support)
    assert np.array_equal(first.query, again.query)
    assert not np.array_equal(first.support, other.support)


def test_ways_and_shots_vary_and_large_classes_give_more() -> None:
    rows, rules = members([4] * 10 + [40] * 10), Rules((5, 15), 100, 30, 5)
    found = [draw(rows, rules, generator(i)) for i in range(300)]
    assert len({one.ways for one in found}) == 11
    assert len({len(one.support) for one in found}) > 30
    small, large = [], []
    for one in found:
        for number, shots in zip(one.classes, np.bincount(one.support_classes), strict=True):
            (small if number < 10 else large).append(shots)
    assert np.mean(large) > 2 * np.mean(small)
    assert max(small) <= 3


def test_a_domain_of_few_small_classes_gives_tasks_too() -> None:
    found = draw(members([2, 2]), Rules(), generator(0))
    assert (found.ways, len(found.support), len(found.query)) == (2, 2, 2)
