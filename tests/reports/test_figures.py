"""Curves: nothing made up, no spike lost, quiet where there is nothing to draw."""

from __future__ import annotations

import math

import pytest

from peftcli.reports import figures


def test_smoothing_keeps_a_constant_and_does_not_lag():
    assert figures.smooth([2.0] * 9, 5) == pytest.approx([2.0] * 9)
    line = [float(i) for i in range(50)]
    assert figures.smooth(line, 5)[10:40] == pytest.approx(line[10:40])
    assert figures.smooth([], 5) == []


def test_thinning_keeps_the_spike_and_the_order():
    values = [math.sin(i / 50) for i in range(50_000)]
    values[31_234] = 99.0
    xs, ys = figures.thin(list(range(50_000)), values)
    assert len(xs) <= figures.MOST_POINTS + 2
    assert ys[xs.index(31_234)] == 99.0
    assert xs == sorted(set(xs))


def test_only_finite_values_are_drawn():
    rows = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": None}, {"step": 4}]
    assert figures.series(rows, "loss") == ([1], [1.0])
    assert [figure.title for figure in figures.training(rows, [])] == ["Loss"]
    assert figures.training([{"step": 1, "loss": math.inf}], []) == []


def test_a_long_run_stays_a_small_file():
    rows = [{"step": i, "loss": 1 + math.sin(i * 7.1), "grad_norm": 2 + math.sin(i)} for i in range(1, 100_001)]
    assert all(len(figure.svg) < 120_000 for figure in figures.training(rows, []))


def test_stage_changes_are_marked():
    rows = [{"step": i, "loss": 1.0 / i, "stage": "head" if i < 5 else "everything"} for i in range(1, 10)]
    assert ">everything<" in figures.training(rows, [])[0].svg.replace(" ", "")


def test_throughput_is_tokens_over_seconds():
    rows = [{"step": i, "tokens": 300, "seconds": 0.5} for i in range(1, 6)]
    assert figures.training(rows, [])[0].caption == "Median 600 tokens a second; slowest 600."


def test_method_figures_from_numbers_and_names():
    lines = {"title": "a", "x": [1, 2, 3], "y": [1, 4, 9], "labels": {"x": "block", "y": "norm"}}
    bars = {"title": "b", "data": {"x": ["q", "v"], "y": [[1, 2], [3, 4]], "labels": ["before", "after"]}}
    first, second = figures.method([lines, bars])
    assert ">block<" in first.svg
    assert ">before<" in second.svg
    assert ">q<" in second.svg
    assert "x has 3 values, y has 2" in figures.method([{"title": "c", "x": [1, 2, 3], "y": [1, 2]}])[0].caption
