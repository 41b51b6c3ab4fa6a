"""What is wrong with columns and rows, in words that name the place and the way out."""

from __future__ import annotations

from typing import Any

from peftcli.config.errors import Mistake, UserError, nearest, unknown
from peftcli.config.schema import DataConfig
from peftcli.data.origins import Origin, places
from peftcli.data.rows import Rows

LIKELY = {
    "text": ("sentence", "content", "body", "document", "review", "tweet", "input"),
    "image": ("img", "picture", "photo", "file", "file_name", "filename", "path", "image_path"),
    "label": ("labels", "class", "category", "topic", "target"),
    "prompt": ("question", "instruction", "input", "query", "source"),
    "completion": ("answer", "output", "response", "target", "summary"),
    "messages": ("conversations", "conversation", "chat", "dialog"),
}
"""Column names that other data sets give to what a task needs; used to suggest, never to choose."""
NAMED_ROWS = 3
"""Bad rows that a message names; the others are counted."""


def mapping(config: DataConfig, needed: list[str], found: dict[str, Origin], notes: list[str]) -> dict[str, str]:
    """What the rows shall hold -> the source's column, checked on the first rows of every file.

    Raises:
        UserError: Columns that are not there, all at once.
    """
    wanted = {name: config.columns.get(name, name) for name in needed}
    if "row" in wanted or "row" in config.columns:
        hint = "write another name in the template and say data.columns.NAME=row"
        raise UserError(Mistake("'row' is the name of a row's position in the source", "data.columns.row", hint=hint))
    for name, column in config.columns.items():
        if name not in wanted:
            notes.append(f"data.columns.{name}: the task does not use {name!r}")
            wanted[name] = column
    mistakes = [
        _no_column(name, column, there, f"{split}, {where}")
        for split, origin in found.items()
        for where, there in origin.columns()
        for name, column in wanted.items()
        if column not in there
    ]
    mistakes += _conditions(config, found)
    if mistakes:
        raise UserError(*mistakes)
    return wanted


def _conditions(config: DataConfig, found: dict[str, Origin]) -> list[Mistake]:
    """What `data.where` asks of splits and columns that are not there."""
    return [
        unknown("column", column, there, f"data.where.{split}", f"columns of {where}")
        for split, origin in found.items()
        for where, there in origin.columns()
        for column in config.where.get(split, {})
        if column not in there
    ]


def _no_column(name: str, column: str, there: list[str], where: str) -> Mistake:
    likely = [c for c in there if c.lower() in LIKELY.get(name, ())]
    close = nearest(column, there) or (likely[0] if likely else "")
    what = f"column {column!r} not found, columns are: {', '.join(there)}"
    return Mistake(
        what, where, nearest=close, hint=f"say which column holds {name}: data.columns.{name}={close or 'COLUMN'}"
    )


def empty(value: Any) -> bool:
    """Whether a needed value says nothing: None, NaN, blank text, an empty list."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, dict):
        return False
    return value is None or value != value or (isinstance(value, list) and not value)


def problem(row: dict[str, Any], columns: dict[str, str], needed: list[str], where: str) -> Mistake | None:
    """Why a row cannot be used, or None."""
    for name in needed:
        if empty(row[name]):
            return Mistake(f"{columns[name]} is empty", where)
    return None


def _empty_places(rows: Rows, name: str) -> list[int]:
    """Where a column is `empty`; text, the usual case, without leaving Arrow."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = rows.table.column(name)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        # Casts and no scalars: a Python number handed to Arrow would import pandas.
        blank = pc.invert(pc.utf8_length(pc.utf8_trim_whitespace(column)).cast(pa.bool_()))
        return pc.indices_nonzero(blank).to_pylist() + pc.indices_nonzero(pc.is_null(column)).to_pylist()
    if pa.types.is_struct(column.type):  # a picture: nothing is copied to look at it
        return pc.indices_nonzero(pc.is_null(column)).to_pylist()
    return [i for i, value in enumerate(rows[name]) if empty(value)]


def usable(rows: Rows, columns: dict[str, str], needed: list[str], origin: Origin) -> tuple[Rows, list[Mistake]]:
    """The rows that have a value in each needed column, and what is wrong with the others."""
    found: dict[int, str] = {}
    for name in needed:
        for i in _empty_places(rows, name):
            found.setdefault(i, f"{columns[name]} is empty")
    if not found:
        return rows, []
    numbers = rows["row"]
    where = places(origin, [numbers[i] for i in found])
    bad = [Mistake(what, where[numbers[i]]) for i, what in sorted(found.items())]
    return rows.select([i for i in range(len(rows)) if i not in found]), bad


def some(bad: list[Mistake], total: int) -> str:
    """How many rows are bad, and the first few of them by their place."""
    named = "; ".join(f"{b.where}: {b.what}" for b in bad[:NAMED_ROWS])
    more = f"; and {len(bad) - NAMED_ROWS} more" if len(bad) > NAMED_ROWS else ""
    return f"{len(bad)} of {total} rows: {named}{more}"


def way_out(bad: Mistake) -> str:
    """What to do about a row that cannot be used, and rows like it."""
    return f"{bad.hint or 'mend them'}, or leave such rows out and count them: data.bad_rows=skip"


def settled(split: str, bad: list[Mistake], total: int, policy: str) -> tuple[Mistake | None, str]:
    """What bad rows come to: the mistake that stops a run, or the note of those left out; neither where there are none.

    Args:
        split: Whose rows they are.
        bad: What is wrong with each.
        total: Rows of the split, those included.
        policy: `data.bad_rows`.
    """
    if bad and (policy == "error" or len(bad) == total):
        return bad_rows(split, bad, total), ""
    return None, f"{split}: left out {some(bad, total)}" if bad else ""


def bad_rows(split: str, bad: list[Mistake], total: int) -> Mistake:
    """The mistake of a split with rows that cannot be used."""
    hint = way_out(bad[0])
    if len(bad) == total:
        hint = f"no row of {split} can be used; take another split (data.splits.{split}=NAME) or column"
    if len(bad) == 1:
        return Mistake(bad[0].what, bad[0].where, hint=hint)
    return Mistake(f"bad rows, {some(bad, total)}", split, hint=hint)
