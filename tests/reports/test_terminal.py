"""The closing table: right numbers, fits a terminal, plain without colour."""

from __future__ import annotations

import io
import random

import example_run
from rich.console import Console

from peftcli.reports import quality, terminal


def shown(report: dict, width: int = 80) -> str:
    text = io.StringIO()
    Console(file=text, width=width).print(terminal.table(report))
    return text.getvalue()


def test_table_fits_eighty_columns_and_tells_quality_and_cost():
    text = shown(example_run.report(random.Random(0)))
    lines = [line.split() for line in text.splitlines()]
    assert ["tuned", "91.0", "%", "87.8", "to", "93.4", "88.1", "%", "0.303", "*"] in lines
    assert "trained 460,800 of 134,975,808 (0.34 %)  peak memory 1.55 GB  time 3 min 28 s" in text
    assert "…" not in text


def test_plain_is_aligned_text_without_control_characters():
    text = terminal.plain(example_run.report(random.Random(0)))
    assert "\x1b" not in text
    assert text.splitlines()[0].startswith("test split, 400 rows")
    assert len(text.splitlines()) == 8
    assert text.splitlines()[-2:] == ["* best of its column", quality.verdict(example_run.report(random.Random(0)))]


def test_names_are_not_markup_and_missing_parts_are_left_out():
    report = {"quality": {"metric": "loss", "rows": [{"name": "[red]x[/nope]", "metrics": {"loss": 1.5}}]}}
    assert "[red]x[/nope]" in shown(report)
    assert "1.500" in terminal.plain(report)
    assert terminal.plain({}).strip() == "test split"


def generated() -> dict:
    protocol = {
        "prompt": "Q: {q}\nA:", "template": "plain", "shots": 1, "decoding": "5 beams", "max_new_tokens": 64,
        "scoring": "number",
    }  # fmt: skip
    rows = [
        {"name": name, "metrics": {"exact_match_strict": share, "loss": 2.5}, "intervals": {"loss": [2.25, 2.75]}}
        for name, share in (("untouched base", 0.1), ("tuned", 0.5))
    ]
    told = {"metric": "exact_match_strict", "split": "test", "rows_measured": 1319, "rows_generated": 40}
    return {"quality": {**told, "protocol": protocol, "rows": rows}}


def test_intervals_of_several_metrics_take_a_row_each_and_the_protocol_is_told():
    lines = terminal.plain(generated()).splitlines()
    assert lines[1].split("  ")[0] == "exact match, strict"
    assert "35.2 to 64.8 %" in lines[1]
    assert lines[2].split() == ["loss", *["2.500", "2.250", "to", "2.750"] * 2]
    assert lines[-2].startswith(
        '40 of 1,319 rows answered after the prompt "Q: {q}\\nA:" with 1 shot; 5 beams, up to 64'
    )
    assert lines[-1].startswith("The tuned model answers 50.0 % of the 40 held-out rows correctly")
    assert "…" not in shown(generated())
