"""`peft data RECIPE`: what the model will see."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer

from peftcli.cli.arguments import AsJson, Overrides, Recipe

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 120
"""Columns of the output where it goes to a file or a pipe."""
MOST_CLASSES = 20
"""Classes that the terminal lists; `--json` has all."""


def data(
    recipe: Recipe,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show what the model will see: counts, balance, lengths, duplicates, rows."""
    from peftcli.config.compose import compose

    composed = compose(recipe, overrides or [])
    for note in composed.notes:
        typer.echo(f"note: {note}", err=True)
    from rich.console import Console

    from peftcli.tasks.survey import survey

    found = survey(composed.config)
    if as_json:
        shown = [text.plain for text in found.shown]
        typer.echo(json.dumps({**found.rows, "tokens": found.tokens, "shown": shown}, indent=2, ensure_ascii=False))
    else:
        console = Console(highlight=False, markup=False)
        if not console.is_terminal:
            console.width = WIDTH
        _print(console, found.rows, found.tokens, found.shown, stops=composed.config.data.bad_rows == "error")
    if found.error:
        raise found.error


def _print(console: Console, rows: dict[str, Any], tokens: dict[str, Any], shown: list[Any], stops: bool) -> None:
    _print_counts(console, rows, tokens)
    _print_classes(console, rows["splits"])
    for split, about in (tokens or rows["splits"]).items():
        _print_lengths(console, split, *(("tokens", about["lengths"]) if tokens else ("words", about["words"])))
    _print_duplicates(console, rows)
    for text in shown:
        console.print("\nA row as the model sees it, what is learnt in [[ ]]:", style="bold")
        console.print(text)
    console.print()
    if rows["skipped"] and stops:
        console.print("peft train stops at the rows left out here, unless data.bad_rows=skip", style="yellow")
    for note in rows["notes"]:
        console.print(f"note: {note}")
    console.print(f"fingerprint: {rows['fingerprint']}")


def _table(console: Console, title: str, *columns: str) -> Any:
    """A title and a table, its first column on the left and numbers on the right; no lines where it goes to a file."""
    from rich import box
    from rich.table import Table

    lines = box.ROUNDED if console.is_terminal else None
    console.print(f"\n{title}", style="bold")
    table = Table(box=lines, pad_edge=console.is_terminal)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    return table


def _print_counts(console: Console, rows: dict[str, Any], tokens: dict[str, Any]) -> None:
    columns = ["tokens", "trained_tokens", "truncated", "dropped"]
    table = _table(console, "Rows", "split", "rows", "left out", "words", *(c.replace("_", " ") for c in columns))
    for split, about in rows["splits"].items():
        left_out = sum(rows["skipped"].get(split, {}).values())
        counts = [f"{tokens[split][c]:,}" if split in tokens else "" for c in columns]
        table.add_row(split, f"{about['rows']:,}", f"{left_out:,}", f"{about['words']['total']:,}", *counts)
    console.print(table)
    for split, reasons in rows["skipped"].items():
        console.print(f"left out of {split}: " + ", ".join(f"{n} ({why})" for why, n in reasons.items()))


def _print_classes(console: Console, splits: dict[str, Any]) -> None:
    names = list(dict.fromkeys(label for about in splits.values() for label in about["labels"]))
    if not names:
        return
    table = _table(console, "Classes", "label", *splits)
    for name in names[:MOST_CLASSES]:
        table.add_row(name, *(_share(about["labels"].get(name, 0), about["rows"]) for about in splits.values()))
    console.print(table)
    if len(names) > MOST_CLASSES:
        console.print(f"and {len(names) - MOST_CLASSES} more labels (all of them with --json)")


def _share(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / total:.1f} %)" if total else "0"


def _print_lengths(console: Console, split: str, unit: str, lengths: dict[str, Any]) -> None:
    title = (
        f"Lengths of {split} in {unit}: median {lengths['median']}, mean {lengths['mean']}, "
        f"95 % up to {lengths['p95']}, longest {lengths['max']}"
    )
    table = _table(console, title, unit, "rows")
    table.add_column("", justify="left")
    most = max((b["rows"] for b in lengths["bins"]), default=1)
    mark = "█" if (console.encoding or "").startswith("utf") else "#"
    for b in lengths["bins"]:
        span = f"{b['from']} to {b['to']}" if b["from"] != b["to"] else str(b["from"])
        table.add_row(span, f"{b['rows']:,}", mark * -(-30 * b["rows"] // most))
    console.print(table)


def _print_duplicates(console: Console, rows: dict[str, Any]) -> None:
    table = _table(console, "Texts that come twice", "rows of", "rows", "against", "equal", "nearly equal")
    for found in rows["duplicates"]:
        against = "earlier rows" if found["against"] == found["split"] else found["against"]
        table.add_row(found["split"], f"{found['rows']:,}", against, f"{found['equal']:,}", f"{found['near']:,}")
    console.print(table)
    for found in rows["duplicates"]:
        for example in found["examples"]:
            kind = "=" if example["similarity"] == 1 else f"{100 * example['similarity']:.0f} %"
            text = " ".join(example["text"].split())[:60]
            console.print(
                f"  {found['split']} row {example['row']} {kind} {found['against']} row {example['other']}: {text}"
            )
    for sentence in rows["leakage"]:
        console.print(f"leak: {sentence}", style="yellow")
    conflicts = rows["conflicts"]
    if conflicts["texts"]:
        console.print(
            f"same text, different labels: {conflicts['texts']} texts in {conflicts['rows']} rows", style="yellow"
        )
    for example in conflicts["examples"]:
        where = ", ".join(f"{r['split']} row {r['row']} {r['label']!r}" for r in example["rows"])
        console.print(f"  {where}: {' '.join(example['text'].split())[:60]}")
