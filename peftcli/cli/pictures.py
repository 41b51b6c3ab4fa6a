"""What `peft data` prints of pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftcli.cli import tables
from peftcli.config import paths

if TYPE_CHECKING:
    from rich.console import Console

NAMED = 5
"""Pictures of a kind that the terminal names; `--json` has all."""


def keep(sheets: dict[str, bytes], fingerprint: str) -> dict[str, str]:
    """Write contact sheets into the cache and return their paths by what they show."""
    from peftcli.artifacts import atomic

    folder = paths.cache() / "sheets" / fingerprint[:12]
    written = {kind: folder / f"{kind.replace(' ', '-')}.png" for kind in sheets}
    for kind, path in written.items():
        atomic.write_bytes(path, sheets[kind])
    return {kind: str(path) for kind, path in written.items()}


def show(console: Console, rows: dict[str, Any], stops: bool) -> None:
    """Print what `peftcli.data.images.survey.describe` found."""
    table = tables.titled(console, "Pictures", "split", "rows", "left out", "smallest", "median", "largest", "odd")
    for split, about in rows["splits"].items():
        spans = [f"{about['width'][key]} x {about['height'][key]}" for key in ("min", "median", "max")]
        odd = ", ".join(f"{count:,} {kind}" for kind, count in about["oddities"].items())
        out = sum(rows["skipped"].get(split, {}).values())
        table.add_row(split, f"{about['rows']:,}", f"{out:,}", *spans, odd)
    console.print(table)
    tables.left_out(console, rows["skipped"])
    for split, problems in rows["problems"].items():
        for one in problems[:NAMED]:
            console.print(f"  {split} row {one['row']}, {one['name']}: {one['kind']}: {one['detail']}")
        if len(problems) > NAMED:
            console.print(f"  and {len(problems) - NAMED} more of {split} (all of them with --json)")
    tables.classes(console, rows["splits"])
    tables.copies(console, "Pictures that come twice", rows)
    tables.conflicts(console, "picture", rows["conflicts"])
    _doubts(console, rows["suspects"])
    for kind, path in rows.get("sheets", {}).items():
        console.print(f"\ncontact sheet of {kind}: {path}", soft_wrap=True)
    tables.end(console, rows, stops)


def _doubts(console: Console, found: dict[str, Any]) -> None:
    if not found["rows"]:
        return
    title = f"Labels in doubt: {found['rows']:,}, going by the pictures most like them"
    table = tables.titled(console, title, "picture", "row", "doubt")
    for column in ("label", "likelier"):
        table.add_column(column, justify="left")
    for one in found["examples"][: 2 * NAMED]:
        name = f"{one['split']} {one['name']}"
        table.add_row(name, str(one["row"]), f"{one['doubt']:.2f}", one["label"], one["likelier"])
    console.print(table)
