"""Intervals: Wilson's for shares, the bootstrap's for the rest, the same every time."""

from __future__ import annotations

import random

import pytest

from peftcli.tasks import intervals
from peftcli.tasks.scoring.text import bleu


def test_right_and_wrong_rows_have_wilsons():
    values = [1] * 5 + [0.0] * 5
    assert intervals.of_mean(values, proportion=True) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert intervals.of_mean(values) == intervals.of_ratio(values, [1] * 10) == pytest.approx((0.2, 0.8))
    assert intervals.of_mean([0.5, 0.5, 0.25], proportion=True) == intervals.of_mean([0.5, 0.5, 0.25])


def test_the_bootstrap_agrees_with_the_normal_theory():
    draw = random.Random(0)
    values = [draw.gauss(3, 2) for _ in range(400)]
    low, high = intervals.of_mean(values)
    mean = sum(values) / 400
    deviation = (sum((v - mean) ** 2 for v in values) / 400) ** 0.5
    assert low == pytest.approx(mean - 1.96 * deviation / 20, abs=0.03)
    assert high == pytest.approx(mean + 1.96 * deviation / 20, abs=0.03)
    assert intervals.of_mean(values) == (low, high)


def test_a_ratio_is_weighted_and_parts_do_not_change_it(monkeypatch):
    totals, weights = [1.0, 30.0, 2.0, 8.0], [1, 10, 1, 4]
    low, high = intervals.of_ratio(totals, weights)
    assert 1 <= low < 41 / 16 < high <= 3
    monkeypatch.setattr(intervals, "AT_ONCE", 40)
    assert intervals.of_ratio(totals, weights) == (low, high)
    assert intervals.of_ratio([0.7], [7]) == pytest.approx((0.1, 0.1))


def test_bleu_lies_in_its_interval():
    expected = [f"the cat number {n} sat on the mat and looked at the moon" for n in range(30)]
    written = [text if n % 3 else text.replace("sat on the mat", "was there") for n, text in enumerate(expected)]
    score, (low, high) = bleu(written, expected)
    assert low < score < high
    assert bleu(written, expected) == (score, (low, high))
    assert bleu(expected, expected)[0] == pytest.approx(100)
