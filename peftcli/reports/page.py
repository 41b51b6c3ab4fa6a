"""The page of a run: one HTML file that opens anywhere, asks nothing of the network and carries its figures inside."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from peftcli.artifacts import atomic
from peftcli.config.checks import CHECKS
from peftcli.reports import answers, costs, figures, quality, record, units, usage
from peftcli.reports.record import Record

HERE = Path(__file__).parent
MOST_EXAMPLES = 500
LONG_TEXT = 320
EXAMPLE_TEXTS = ("row", "input", "expected", "base", "tuned")


def write(run: Path) -> Path:
    """Write `report.html` into a run folder from what lies there.

    A stopped or failed run gets a page too, of the parts that exist. Equal contents give equal bytes.

    Args:
        run: The run folder: config.yaml, metrics.jsonl, report.json, environment.json, overrides.txt, each optional.

    Returns:
        The path of the page.

    Raises:
        UserError, CheckFailed: As `atomic.file`; an earlier page is unchanged.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        count=units.count, size=units.size, percent=units.percent, duration=units.duration, title=quality.title
    )
    environment.filters.update(unbroken=_unbroken, prose=_prose)
    page = Path(run) / "report.html"
    atomic.write_text(page, environment.get_template("page.html").render(_content(record.read(Path(run)))))
    return page


def _unbroken(sentence: str) -> str:
    """The sentence with words like held-out, and numbers with their sign, kept on one line."""
    return re.sub(r"(?<=\w)-(?=\w)", "\N{NON-BREAKING HYPHEN}", sentence).replace(" %", "\N{NO-BREAK SPACE}%")


def _prose(text: str) -> str:
    """Escaped text in which `words in backticks` are set as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _content(run: Record) -> dict[str, Any]:
    """Everything the template shows, in its order; the template itself decides nothing but layout."""
    report, script = run.report, (HERE / "page.js").read_text(encoding="utf-8")
    table = quality.table(report)
    bars = bool(table.metrics) and table.metrics[0] in quality.SHARES and any(c[0].interval for _, c in table.rows)
    about, answered = report.get("run") or {}, (report.get("quality") or {}).get("answers") or {}
    shown, left_out = _examples(report, _group(run, "task").get("type") == "classification")
    checks = sorted(report.get("checks") or [], key=lambda check: bool(check.get("passed")))
    return {
        "style": (HERE / "page.css").read_text(encoding="utf-8"),
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "name": about.get("name") or run.config.get("name") or run.path.name,
        "status": about.get("status") or "unfinished",
        "state": _state(run),
        "verdict": quality.verdict(report),
        "facts": list(_facts(run)),
        "quality": table,
        "bars": bars,
        "ranges": any(cell.interval for _, cells in table.rows for cell in cells[bars:]),
        "unit": quality.unit_of(report),
        "protocol": quality.protocol(report),
        "answer_figures": answers.figures(answered),
        "worst": answers.worst(answered),
        "split": (report.get("quality") or {}).get("split", "test"),
        "cost": list(_cost(report)),
        "forms": costs.table(report.get("costs") or {}),
        "checks": checks,
        "meanings": CHECKS,
        "glosses": quality.glosses(report),
        "failed": sum(not check.get("passed") for check in checks),
        "figures": figures.training(run.steps, run.validations, (report.get("quality") or {}).get("metric") or ""),
        "method_figures": figures.method(report.get("figures") or []),
        "parameters": report.get("parameters") or {},
        "splits": _splits(report),
        "notes": [str(note) for note in (report.get("data") or {}).get("notes") or []],
        "unread": run.notes,
        "examples": shown,
        "left_out": left_out,
        "long_text": LONG_TEXT,
        "confusions": _confusions(report, _group(run, "task").get("type") == "classification"),
        "usage": usage.commands(run),
        "config": run.config_text,
        "overrides": run.overrides,
        "environment": list(_flat(run.environment)),
    }


def _group(run: Record, name: str) -> dict[str, Any]:
    group = run.config.get(name)
    return group if isinstance(group, dict) else {}


def _state(run: Record) -> str:
    """What a reader must know before the numbers: that the run did not end as meant."""
    status = (run.report.get("run") or {}).get("status")
    at = f" at step {run.steps[-1]['step']:,}" if run.steps else ""
    if status == "done":
        return ""
    if status == "failed":
        failed = [check for check in run.report.get("checks") or [] if not check.get("passed")]
        why = "; ".join(f"{check.get('name')}: {check.get('detail')}" for check in failed)
        return f"This run failed{at}." + (f" {why}" if why else "")
    if status == "stopped":
        return f"This run was stopped{at} and can be continued; what follows is what it had reached."
    return f"This run has not finished; the last logged line is{at}." if at else "This run has not logged a step yet."


def _facts(run: Record) -> Iterator[tuple[str, str]]:
    model, method, data = (_group(run, name) for name in ("model", "method", "data"))
    about = run.report.get("run") or {}
    yield "base model", str(model.get("name") or "")
    yield "method", " ".join(str(part) for part in (method.get("name"), method.get("type")) if part)
    yield "data", str(data.get("name") or data.get("source") or "")
    yield "seed", str(about.get("seed", run.config.get("seed", "")))
    yield "started", str(about.get("created") or "").replace("T", " ").replace("Z", " UTC")
    yield "run", str(about.get("id") or "")


def _cost(report: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Name, figure and a line of detail for what the run cost."""
    parameters, memory = report.get("parameters") or {}, report.get("memory") or {}
    time, adapter = report.get("time") or {}, report.get("adapter") or {}
    if trained := parameters.get("trainable"):
        total = parameters.get("total")
        share = f"{units.percent(trained / total, 2)} of {total:,}" if total else ""
        yield "Trained parameters", units.count(trained), share
    if adapter.get("bytes"):
        folder = PurePath(str(adapter.get("path") or "adapter")).name
        yield f"{folder.capitalize()} on disk", units.size(adapter["bytes"]), f"in {folder}/"
    if memory.get("peak_bytes"):
        loaded = memory.get("loaded_bytes")
        growth = f"{units.size(memory['peak_bytes'] - loaded)} above the loaded model" if loaded else ""
        yield "Peak memory", units.size(memory["peak_bytes"]), growth
    if time.get("total_seconds"):
        phases = (("train_seconds", "of it training"), ("first_step_seconds", "until the first step was done"))
        parts = [f"{units.duration(time[key])} {words}" for key, words in phases if time.get(key)]
        yield "Time", units.duration(time["total_seconds"]), ", ".join(parts)
    if time.get("median_step_seconds"):
        rates = [
            f"{time[key]:,.{digits}f} {words}"
            for key, digits, words in (("rows_per_second", 1, "rows/s"), ("tokens_per_second", 0, "tokens/s"))
            if time.get(key)
        ]
        yield "Median step", units.duration(time["median_step_seconds"]), ", ".join(rates)


def _splits(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    data = report.get("data") or {}
    return [(name, counts) for name, counts in data.items() if isinstance(counts, dict) and "rows" in counts]


def _examples(report: dict[str, Any], labelled: bool) -> tuple[list[dict[str, Any]], int]:
    """Examples with the wrong ones first, each with what tuning changed, and how many more there are."""
    examples = [
        {
            **{key: _text(row.get(key)) for key in EXAMPLE_TEXTS},
            "correct": row.get("correct"),
            "change": _change(row) if labelled else "",
        }
        for row in report.get("examples") or []
    ]
    ordered = sorted(examples, key=lambda example: {False: 0, None: 1}.get(example["correct"], 2))
    return ordered[:MOST_EXAMPLES], max(0, len(ordered) - MOST_EXAMPLES)


def _text(value: Any) -> str:
    """A cell's text; several drawn answers one below the other."""
    if isinstance(value, list):
        return "\n\n".join(f"{i}. {text}" for i, text in enumerate(value, 1))
    return "" if value is None else str(value)


def _change(row: dict[str, Any]) -> str:
    if row.get("base") is None or row.get("expected") is None:
        return ""
    before, after = str(row["base"]) == str(row["expected"]), bool(row.get("correct"))
    return {(False, True): "mended", (True, False): "broken"}.get((before, after), "")


def _confusions(report: dict[str, Any], labelled: bool) -> list[tuple[str, str, int]]:
    """The most frequent mistakes of a classifier: expected, answered, how often."""
    wrong = [row for row in report.get("examples") or [] if labelled and row.get("correct") is False]
    pairs = Counter((str(row.get("expected")), str(row.get("tuned"))) for row in wrong)
    return [(*pair, n) for pair, n in sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:5]]


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list):
        yield prefix, ", ".join(map(str, tree)) or "none"
    else:
        yield prefix, "none" if tree is None else str(tree)
