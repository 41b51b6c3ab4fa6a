"""Numbers: the best of each column, intervals, and a verdict that never claims more than its rows allow."""

from __future__ import annotations

import random

import example_run
import pytest

from peftcli.reports import quality, units


def measured(rows: dict[str, float], n: int | None = 400, metric: str = "accuracy", higher: bool = True) -> dict:
    named = [{"name": name, "metrics": {metric: value}} for name, value in rows.items()]
    data = {"test": {"rows": n}} if n else {}
    return {"quality": {"metric": metric, "higher_is_better": higher, "split": "test", "rows": named}, "data": data}


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (364, 400, 0.8779, 0.9343)],
)
def test_wilson_against_published_values(right, n, low, high):
    assert quality.wilson(right / n, n) == pytest.approx((low, high), abs=6e-4)


def test_difference_is_symmetric_and_narrows_with_more_rows():
    low, high = quality.difference(0.8, 0.6, 70)
    assert low < 0.2 < high
    assert quality.difference(0.6, 0.8, 70) == pytest.approx((-high, -low))
    wide = quality.difference(0.8, 0.6, 20)
    assert wide[0] < low
    assert wide[1] > high


def test_table_marks_the_best_of_each_column_by_its_own_direction():
    table = quality.table(example_run.report(random.Random(0)))
    assert table.metrics == ["accuracy", "f1_macro", "loss"]
    best = {table.metrics[i]: name for name, cells in table.rows for i, cell in enumerate(cells) if cell.best}
    simple = "TF-IDF + logistic regression"
    assert best == {"accuracy": simple, "f1_macro": simple, "loss": "tuned"}
    tuned = dict(table.rows)["tuned"]
    assert [cell.text for cell in tuned] == ["91.0 %", "88.1 %", "0.303"]
    assert tuned[0].interval == pytest.approx((0.878, 0.934), abs=1e-3)
    assert tuned[1].interval is None  # F1 is no count of right rows
    assert dict(table.rows)["majority class"][2].text == "–"


def test_level_rows_have_no_best():
    assert not any(cells[0].best for _, cells in quality.table(measured({"untouched base": 0.5, "tuned": 0.5})).rows)


def test_generated_metrics_count_only_the_generated_rows():
    report = measured({"tuned": 0.5}, metric="exact_match")
    report["quality"]["rows_generated"] = 32
    assert quality.measured_rows(report, "exact_match") == 32
    assert quality.measured_rows(report, "loss") == 400


@pytest.mark.parametrize(
    ("rows", "n", "end"),
    [
        ({"untouched base": 0.43, "tuned": 0.91}, 400, "the untouched base 43.0 %: tuning paid off."),
        (
            {"untouched base": 0.43, "TF-IDF + logistic regression": 0.9675, "tuned": 0.91},
            400,
            "the simple baseline wins here.",
        ),
        ({"untouched base": 0.43, "TF-IDF + logistic regression": 0.935, "tuned": 0.91}, 200, "200 rows are too few"),
        ({"untouched base": 0.9, "tuned": 0.5}, 400, "tuning made the model worse."),
        (
            {"untouched base": 0.5, "tuned": 0.6},
            20,
            "20 rows are too few to tell the tuned model and the untouched base apart.",
        ),
        ({"tuned": 0.6}, 20, "nothing was measured to compare it with."),
    ],
)
def test_verdict_of_accuracies(rows, n, end):
    sentence = quality.verdict(measured(rows, n))
    assert sentence.startswith("The tuned model answers")
    assert end in sentence


def test_verdict_names_the_majority_class_only_where_it_is_the_rival():
    told = quality.verdict(measured({"untouched base": 0.43, "majority class": 0.3, "tuned": 0.91}))
    assert "most frequent" not in told
    rival = quality.verdict(measured({"untouched base": 0.43, "majority class": 0.9, "tuned": 0.6}))
    assert "always answering the most frequent class 90.0 %: the simple baseline wins here." in rival


def test_verdict_of_a_loss_knows_that_lower_is_better():
    report = measured({"untouched base": 3.571, "tuned": 2.1}, metric="loss", higher=False)
    assert quality.verdict(report) == (
        "On the 400 held-out rows the tuned model's loss is 2.100 (lower is better); "
        "the untouched base 3.571: the tuned model is better."
    )


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (units.size(999), "999 bytes"),
        (units.size(1_849_344), "1.85 MB"),
        (units.size(999_700), "1 MB"),
        (units.size(None), "–"),
        (units.duration(0.6123), "0.61 s"),
        (units.duration(59.96), "1 min 0 s"),
        (units.duration(3599.7), "1 h 0 min"),
        (units.duration(11_530), "3 h 12 min"),
        (units.percent(0.00341, 2), "0.34 %"),
        (units.percent(0.0000012, 2), "0.00012 %"),
        (units.number(3.5e-5), "3.50e-05"),
        (units.number(float("nan")), "nan"),
    ],
)
def test_numbers_are_written_as_people_write_them(text, wanted):
    assert text == wanted
