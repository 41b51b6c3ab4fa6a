"""What was measured, said no louder than the number of rows allows."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, TypeGuard

from peftcli.reports import units
from peftcli.tasks.intervals import wilson

PROPORTIONS = frozenset({
    "accuracy", "exact_match", "answer_accuracy", "exact_match_strict", "exact_match_flexible", "math_verify",
    "math_verify_strict", "execution_match",
})  # fmt: skip
"""Metrics that are a count of right rows over all rows, so that a binomial interval holds."""
SHARES = PROPORTIONS | {
    "balanced_accuracy", "f1_macro", "f1", "precision", "recall", "auroc", "average_precision",
    "recall_at_false_alarms", "calibration_error",
}  # fmt: skip
LOWER_IS_BETTER = frozenset({"loss", "perplexity", "calibration_error"})
AFTER = "tuned, then "
"""Begins the names of what a few-shot run's own model of each task became by fine-tuning."""
PART = "accuracy_"
"""Begins the names of the accuracy on some domains."""
PASS = "pass_at_"
"""Begins the names of shares of programs that pass their tests."""
TITLES = {
    "f1_macro": "F1 (macro)", "rouge_1": "ROUGE-1", "rouge_2": "ROUGE-2", "rouge_l": "ROUGE-L", "bleu": "BLEU",
    "math_verify": "math-verify", "math_verify_strict": "math-verify, boxed", "auroc": "AUROC",
    "exact_match_strict": "exact match, strict", "exact_match_flexible": "exact match, flexible",
}  # fmt: skip
GLOSSES = {
    "balanced_accuracy": "the mean over the classes of the share answered correctly; rare classes count as much",
    "f1_macro": "the mean over the classes of F1, which falls with rows missed and with rows wrongly given",
    "auroc": "the chance that a row of a class is ranked above one that is not of it; 50 % is guessing",
    "average_precision": "the mean precision over all thresholds; guessing gives the share of the class",
    "recall_at_false_alarms": "the share of a class that is found while {rate} of the other rows are taken for it",
    "calibration_error": "the mean gap between how sure the model is and how often it is right",
}
"""Metrics that need a line of explanation."""


@dataclass(frozen=True)
class Cell:
    """One metric of one row: its value, how it is written, whether it is the column's best."""

    value: float | None
    text: str
    best: bool
    interval: tuple[float, float] | None
    range: str
    """The interval as it is written."""


@dataclass(frozen=True)
class Table:
    """The quality table: metric names, and a name with its cells a row."""

    metrics: list[str]
    rows: list[tuple[str, list[Cell]]]
    counts: dict[str, int | None]


def difference(first: float, second: float, n: int) -> tuple[float, float]:
    """The 95 % interval of the difference of two proportions of `n` rows each (Newcombe 1998, method 10).

    It takes the two for independent; both saw the same rows, so it is wider than a paired one, never bolder.
    """
    (low1, high1), (low2, high2) = wilson(first, n), wilson(second, n)
    gap = first - second
    return gap - math.hypot(first - low1, high2 - second), gap + math.hypot(high1 - first, second - low2)


def written(metric: str, value: float | None) -> str:
    """A metric's value as people write it: shares in percent, the rest as numbers."""
    share = metric in SHARES or metric.startswith((PASS, PART))
    return units.percent(value) if share else units.number(value)


def title(metric: str) -> str:
    """A metric's name in words."""
    if metric.startswith(PASS):
        return f"pass@{metric.removeprefix(PASS)}"
    return TITLES.get(metric, metric.replace("_", " "))


def higher_is_better(metric: str, quality: dict[str, Any]) -> bool:
    """Which way is up; the report's own word counts for its main metric."""
    if metric == quality.get("metric") and isinstance(quality.get("higher_is_better"), bool):
        return quality["higher_is_better"]
    return metric not in LOWER_IS_BETTER


def measured_rows(report: dict[str, Any], metric: str) -> int | None:
    """How many rows a metric was measured on; generated answers are measured on a few."""
    quality = report.get("quality") or {}
    split = (report.get("data") or {}).get(quality.get("split", "test")) or {}
    if metric not in LOWER_IS_BETTER and (generated := quality.get("rows_generated")):
        return generated
    return quality.get("rows_measured") or split.get("rows") or None


def table(report: dict[str, Any]) -> Table:
    """The quality table of a report, with the best value of each column marked and intervals where they hold."""
    quality = report.get("quality") or {}
    rows = [
        (str(row.get("name", "")), row.get("metrics") or {}, row.get("intervals") or {})
        for row in quality.get("rows") or []
    ]
    names = list(dict.fromkeys(name for _, metrics, _ in rows for name in metrics))
    rows = rows if names else []  # a run without held-out rows
    main = quality.get("metric")
    metrics = [main, *(m for m in names if m != main)] if main in names else names
    counts = {m: measured_rows(report, m) for m in metrics}
    best = {}
    for metric in metrics:
        values = [v[metric] for _, v, _ in rows if _finite(v.get(metric))]
        if len(values) > 1 and len(set(values)) > 1:
            best[metric] = (max if higher_is_better(metric, quality) else min)(values)

    def cell(metric: str, value: Any, measured: Any) -> Cell:
        if not isinstance(value, int | float):
            return Cell(None, units.NONE, False, None, "")
        n = counts[metric]
        interval = (measured[0], measured[1]) if measured else None
        if interval is None and metric in PROPORTIONS and n and 0 <= value <= 1:
            interval = wilson(value, n)
        ends = [written(metric, end) for end in interval or ()]
        told = f"{ends[0].removesuffix(' %')} to {ends[1]}" if ends else ""
        return Cell(value, written(metric, value), value == best.get(metric), interval, told)

    cells = [(name, [cell(m, values.get(m), bounds.get(m)) for m in metrics]) for name, values, bounds in rows]
    return Table(metrics, cells, counts)


def glosses(report: dict[str, Any]) -> dict[str, str]:
    """A line of explanation for each metric that needs one."""
    rate = ((report.get("quality") or {}).get("answers") or {}).get("false_alarms")
    return {name: gloss.format(rate=units.percent(rate)) for name, gloss in GLOSSES.items()}


def protocol(report: dict[str, Any]) -> str:
    """How generated answers were asked for and judged, or from which score on a picture has what is looked for and what
    came of it; empty for tasks with neither."""
    quality = report.get("quality") or {}
    if alarms := (quality.get("answers") or {}).get("alarms"):
        return _alarms(alarms, str(quality.get("split", "test")))
    told, generated = quality.get("protocol"), quality.get("rows_generated")
    if not told or not generated:
        return ""
    of_all = f" of {quality['rows_measured']:,}" if quality.get("rows_measured") else ""
    prompt, shots = json.dumps(told["prompt"], ensure_ascii=False), told["shots"]
    return (
        f"{generated:,}{of_all} rows answered after the prompt {prompt} with {shots or 'no'} shot{'s' * (shots != 1)}; "
        f"{told['decoding']}, up to {told['max_new_tokens']} tokens, judged as {told['scoring']}"
    )


def _alarms(told: dict[str, Any], split: str) -> str:
    positive, score, asked = told["positive"], units.percent(told["score"]), units.percent(told["asked"])
    if told["expected"] is None:
        why = "no validation pictures could set it by `task.false_alarms`"
    else:
        few = told["expected"] > told["asked"]
        more = f"they are too few for that: {units.percent(told['expected'])} are to be expected" if few else ""
        why = f"{told['rows']:,} other validation pictures set it so that at most {asked} of them are false alarms"
        why += f" ({more})" if more else ""
    (found, there), (false, others) = told["found"], told["false"]
    came = [f"{found:,} of {there:,} {positive} pictures are found{_range(found, there)}"] if there else []
    came += [f"{false:,} of {others:,} others are false alarms{_range(false, others)}"] if others else []
    return f"A picture is called {positive} above a score of {score}; {why}. On the {split} split {', '.join(came)}"


def _range(count: int, rows: int) -> str:
    low, high = wilson(count / rows, rows)
    return f" ({units.percent(low).removesuffix(' %')} to {units.percent(high)})"


def verdict(report: dict[str, Any]) -> str:
    """The result in one or two sentences for someone who does not train models."""
    quality = report.get("quality") or {}
    metric = quality.get("metric") or ""
    measured = [(str(row.get("name")), (row.get("metrics") or {}).get(metric)) for row in quality.get("rows") or []]
    values: dict[str, float] = {name: value for name, value in measured if _finite(value)}
    if "tuned" not in values:
        return "The tuned model was not measured on held-out rows, so this page cannot say whether tuning helped."
    n, unit = measured_rows(report, metric), unit_of(report)
    held_out = f"{n:,} held-out {unit}" if n else f"held-out {unit}"
    values = {name: value for name, value in values.items() if not name.startswith(AFTER)}
    tuned = values.pop("tuned")
    if metric in PROPORTIONS:
        whole = f"the {held_out}" if unit == "rows" else f"what the {held_out} ask"
        start = f"The tuned model answers {units.percent(tuned)} of {whole} correctly"
    else:
        better = "higher is better" if higher_is_better(metric, quality) else "lower is better"
        start = f"On the {held_out} the tuned model's {title(metric)} is {written(metric, tuned)} ({better})"
    if not values:
        return f"{start}; nothing was measured to compare it with."
    sign = 1 if higher_is_better(metric, quality) else -1
    best = max(values, key=lambda name: sign * values[name])
    told = [name for name in values if name != "majority class" or best == name or len(values) == 1]
    others = ", ".join(f"{_article(name)} {written(metric, values[name])}" for name in told)
    gaps = (tuned - values[best],) * 2
    if metric in PROPORTIONS and n:
        gaps = difference(tuned, values[best], n) if unit == "rows" else _of_intervals(report, metric, best)
    return f"{start}; {others}: {_conclusion(best, sorted(sign * gap for gap in gaps), n, unit)}"


def unit_of(report: dict[str, Any]) -> str:
    """What is counted where a model is measured: rows, or whole few-shot tasks."""
    return str((report.get("quality") or {}).get("unit") or "rows")


def _of_intervals(report: dict[str, Any], metric: str, rival: str) -> tuple[float, float]:
    """The 95 % interval of the tuned model's lead, from the intervals over tasks; taken for independent, as above."""
    rows = {row["name"]: row for row in report["quality"]["rows"]}
    gap = rows["tuned"]["metrics"][metric] - rows[rival]["metrics"][metric]
    ends = [rows[name].get("intervals", {}).get(metric) or (0.0, 0.0) for name in ("tuned", rival)]
    half = math.hypot(*((high - low) / 2 for low, high in ends))
    return gap - half, gap + half


def _conclusion(rival: str, gap: list[float], n: int | None, unit: str) -> str:
    low, high = gap
    if low == high:  # no interval, so no more is said than which is ahead
        return f"{'the tuned model' if low > 0 else _article(rival)} is better." if low else "they are level."
    if low > 0:
        return "tuning paid off."
    if high < 0:
        if rival == "untouched base":
            return "tuning made the model worse."
        return "the simple baseline wins here."
    return f"{n:,} {unit} are too few to tell the tuned model and {_article(rival)} apart."


def _article(name: str) -> str:
    if name == "majority class":
        return "always answering the most frequent class"
    return f"the {name}" if name == "untouched base" else name


def _finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)
