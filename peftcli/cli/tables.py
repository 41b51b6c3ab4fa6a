"""Tables on the terminal, and what `peft data` prints of rows: what is left out, classes, lengths, copies, notes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MOST_CLASSES = 20
"""Classes that the terminal lists; `--json` has all."""


def whole_lines() -> Console:
    """A console that cuts no line where it is not a terminal, for grep."""
    from rich.console import Console

    return Console(markup=False, width=None if Console().is_terminal else 1000)


def titled(console: Console, title: str, *columns: str) -> Table:
    """A title and a table, its first column on the left and numbers on the right; no lines where it goes to a file."""
    from rich import box
    from rich.table import Table

    lines = box.ROUNDED if console.is_terminal else None
    console.print(f"\n{title}", style="bold")
    table = Table(box=lines, pad_edge=console.is_terminal)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    return table


def left_out(console: Console, skipped: dict[str, dict[str, int]]) -> None:
    """Rows that cannot be used, by split and reason."""
    for split, reasons in skipped.items():
        console.print(f"left out of {split}: " + ", ".join(f"{n} ({why})" for why, n in reasons.items()))


def classes(console: Console, splits: dict[str, Any]) -> None:
    """Rows of each label and their share, by split; nothing where rows have none."""
    names = list(dict.fromkeys(label for about in splits.values() for label in about["labels"]))
    if not names:
        return
    table = titled(console, "Classes", "label", *splits)
    for name in names[:MOST_CLASSES]:
        table.add_row(name, *(_share(about["labels"].get(name, 0), about["rows"]) for about in splits.values()))
    console.print(table)
    if len(names) > MOST_CLASSES:
        console.print(f"and {len(names) - MOST_CLASSES} more labels (all of them with --json)")


def _share(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / total:.1f} %)" if total else "0"


def lengths(console: Console, split: str, unit: str, found: dict[str, Any]) -> None:
    """A histogram of `peftcli.data.inspect`."""
    title = (
        f"Lengths of {split} in {unit}: median {found['median']}, mean {found['mean']}, "
        f"95 % up to {found['p95']}, longest {found['max']}"
    )
    table = titled(console, title, unit, "rows")
    table.add_column("", justify="left")
    most = max((b["rows"] for b in found["bins"]), default=1)
    mark = "█" if (console.encoding or "").startswith("utf") else "#"
    for b in found["bins"]:
        span = f"{b['from']} to {b['to']}" if b["from"] != b["to"] else str(b["from"])
        table.add_row(span, f"{b['rows']:,}", mark * -(-30 * b["rows"] // most))
    console.print(table)


def copies(console: Console, title: str, rows: dict[str, Any]) -> None:
    """Rows that come twice, with examples, and what of the training rows is in the other splits."""
    table = titled(console, title, "rows of", "rows", "against", "equal", "nearly equal")
    for found in rows["duplicates"]:
        against = "earlier rows" if found["against"] == found["split"] else found["against"]
        table.add_row(found["split"], f"{found['rows']:,}", against, f"{found['equal']:,}", f"{found['near']:,}")
    console.print(table)
    for found in rows["duplicates"]:
        for example in found["examples"]:
            kind = "=" if example["similarity"] == 1 else f"{int(100 * example['similarity'])} %"
            text = " ".join(example["text"].split())[:60]
            console.print(
                f"  {found['split']} row {example['row']} {kind} {found['against']} row {example['other']}: {text}"
            )
    for sentence in rows["leakage"]:
        console.print(f"leak: {sentence}", style="yellow")


def conflicts(console: Console, what: str, found: dict[str, Any]) -> None:
    """Equal rows with different labels.

    Args:
        console: Where to.
        what: One of them, such as text.
        found: `rows`, `examples`, and the number of them under the name of `what` in the plural.
    """
    if number := found[f"{what}s"]:
        console.print(f"same {what}, different labels: {number} {what}s in {found['rows']} rows", style="yellow")
    for example in found["examples"]:
        where = ", ".join(f"{r['split']} row {r['row']} {r['label']!r}" for r in example["rows"])
        console.print(f"  {where}: {' '.join(example['text'].split())[:60]}")


def end(console: Console, rows: dict[str, Any], stops: bool) -> None:
    """What training would stop at, notes and fingerprint."""
    console.print()
    if rows["skipped"] and stops:
        console.print("peft train stops at the rows left out here, unless data.bad_rows=skip", style="yellow")
    for note in rows["notes"]:
        console.print(f"note: {note}")
    console.print(f"fingerprint: {rows['fingerprint']}")
