"""Curves: nothing made up, no spike lost, quiet where there is nothing to draw."""

from __future__ import annotations

import math
import re

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


def left_ends(svg: str) -> list[float]:
    """Where the labels of the vertical axis begin, at 6.5 units a figure."""
    found = re.findall(r'anchor: end;[^>]*? x="([\d.]+)"[^>]*>([^<]+)<', svg)
    return [float(x) - 6.5 * len(text.replace(".", "")) - 3 for x, text in found]


def test_the_labels_of_the_vertical_axis_stay_inside():
    for megabytes in range(300, 1600, 50):
        rows = [{"step": i, "memory_bytes": megabytes * 10**6} for i in range(1, 4)]
        [memory] = figures.training(rows, [])
        assert min(left_ends(memory.svg)) >= 0, megabytes


def test_an_axis_has_several_ticks_and_is_logarithmic_only_over_a_wide_range():
    for low, high, wide in ((2.1, 4.5, False), (1.1, 1.9, False), (0.5, 6.0, True)):
        drawn = figures.training([{"step": 1, "grad_norm": low}, {"step": 2, "grad_norm": high}], [])
        assert ("logarithmic" in drawn[0].caption) == wide
        assert len(left_ends(drawn[0].svg)) >= 3


def test_the_caption_of_the_loss_compares_like_with_like():
    rows = [{"step": i + 1, "loss": loss} for i, loss in enumerate([0.0, 2.0, 2.0, 2.0, 2.0, 2.0, 0.0])]
    assert figures.training(rows, [])[0].caption == "Smoothed, from 1.478 at step 1 to 1.478 at step 7."


def test_method_figures_from_numbers_and_names():
    lines = {"title": "a", "x": [1, 2, 3], "y": [1, 4, 9], "labels": {"x": "block", "y": "norm"}}
    bars = {"title": "b", "data": {"x": ["q", "v"], "y": [[1, 2], [3, 4]], "labels": ["before", "after"]}}
    first, second = figures.method([lines, bars])
    assert ">block<" in first.svg
    assert ">before<" in second.svg
    assert ">q<" in second.svg
    assert "x has 3 values, y has 2" in figures.method([{"title": "c", "x": [1, 2, 3], "y": [1, 2]}])[0].caption


def shaded(svg: str) -> dict[str, int]:
    """How many cells there are of each strength, the legend's own swatches aside."""
    found: dict[str, int] = {}
    for shape, share in re.findall(r'<path d="([^"]+)"[^>]* style="fill: var\(--tuned\)(?:; opacity: ([\d.]+))?', svg):
        found[share or "1"] = max(found.get(share or "1", 0), shape.count("M "))
    return found


def test_a_heat_map_shows_every_cell_and_says_what_the_shades_are():
    labels = {"x": "channels", "y": [f"layer {i}" for i in range(40)], "value": "chosen"}
    counts = [[i % 3, 0, 4] for i in range(40)]
    [drawn] = figures.method([{"title": "where", "heat": counts, "labels": labels}])
    assert (drawn.title, drawn.caption) == ("where", "")
    said = re.findall(r">([^<>]+)</text>", drawn.svg)
    assert {"channels", "chosen", "layer 0", "layer 39", "1", "2", "4"} <= set(said)
    assert shaded(drawn.svg) == {"0.25": 13, "0.5": 13, "1": 40}
    assert len(drawn.svg) < 120_000


def test_heat_maps_of_shares_of_nothing_and_of_uneven_rows():
    heats = [[0.01 * i for i in range(99)]], [[0, 0]], [[1, 2], [3]]
    shares, nothing, uneven = figures.method([{"heat": heat} for heat in heats])
    assert sum(shaded(shares.svg).values()) == 98
    assert len(shaded(shares.svg)) == 8
    assert shaded(nothing.svg) == {}
    assert nothing.caption == ""
    assert "must be of one length" in uneven.caption
    assert uneven.svg == ""
