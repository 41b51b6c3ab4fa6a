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
