"""`peft data RECIPE`: what the model will see."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer

from peftcli.cli import pictures, tables
from peftcli.cli.arguments import AsJson, Overrides, Recipe

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 120
"""Columns of the output where it goes to a file or a pipe."""


def data(
    recipe: Recipe,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show what the model will see: counts, balance, lengths or sizes, duplicates, doubtful labels, rows."""
    from peftcli.config.compose import compose

    composed = compose(recipe, overrides or [])
    for note in composed.notes:
        typer.echo(f"note: {note}", err=True)
    from rich.console import Console

    from peftcli.tasks.survey import survey

    found = survey(composed.config)
    if found.sheets:
        found.rows["sheets"] = pictures.keep(found.sheets, found.rows["fingerprint"])
    if as_json:
        shown = [text.plain for text in found.shown]
        typer.echo(json.dumps({**found.rows, "tokens": found.tokens, "shown": shown}, indent=2, ensure_ascii=False))
    else:
        console = Console(highlight=False, markup=False)
        if not console.is_terminal:
            console.width = WIDTH
        stops = composed.config.data.bad_rows == "error"
        if composed.config.task.type == "images" or getattr(composed.config.task, "reads", "") == "pictures":
            pictures.show(console, found.rows, stops)
        else:
            _print(console, found.rows, found.tokens, found.shown, stops)
    if found.error:
        raise found.error


def _print(console: Console, rows: dict[str, Any], tokens: dict[str, Any], shown: list[Any], stops: bool) -> None:
    _print_counts(console, rows, tokens)
    tables.classes(console, rows["splits"])
    for split, about in (tokens or rows["splits"]).items():
        tables.lengths(console, split, *(("tokens", about["lengths"]) if tokens else ("words", about["words"])))
    tables.copies(console, "Texts that come twice", rows)
    tables.conflicts(console, "text", rows["conflicts"])
    for text in shown:
        console.print("\nA row as the model sees it, what is learnt in [[ ]]:", style="bold")
        console.print(text)
    tables.end(console, rows, stops)


def _print_counts(console: Console, rows: dict[str, Any], tokens: dict[str, Any]) -> None:
    columns = ["tokens", "trained_tokens", "truncated", "dropped"]
    named = [column.replace("_", " ") for column in columns]
    table = tables.titled(console, "Rows", "split", "rows", "left out", "words", *named)
    for split, about in rows["splits"].items():
        left_out = sum(rows["skipped"].get(split, {}).values())
        counts = [f"{tokens[split][c]:,}" if split in tokens else "" for c in columns]
        table.add_row(split, f"{about['rows']:,}", f"{left_out:,}", f"{about['words']['total']:,}", *counts)
    console.print(table)
    tables.left_out(console, rows["skipped"])
