"""Labelled rows that a finished few-shot model is shown: a folder of classes, or a file of rows with their labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from peftcli.config.errors import Mistake, UserError
from peftcli.config.schema import DataConfig
from peftcli.data import checking, formats, origins
from peftcli.data.images import places
from peftcli.data.origin import Origin
from peftcli.data.rows import Rows

SUPPORT = "--support"
_KEY = "support"


def read(path: Path, config: DataConfig, needed: list[str]) -> tuple[Rows, list[str]]:
    """The rows of a support set, with a column for each needed name, and `row`.

    Args:
        path: For pictures a folder with a sub-folder for each class; else jsonl, csv or parquet.
        config: The run's `data` group, whose `columns`, `format` and `bad_rows` hold here too.
        needed: What the task reads of a row, with `label`.

    Returns:
        The rows, and what was done that nobody asked for word by word.

    Raises:
        UserError: There is nothing there, columns are missing, or rows cannot be used and are not to be skipped.
    """
    notes: list[str] = []
    try:
        origin = _origin(path.expanduser(), config, needed, notes)
        columns = checking.mapping(_plain(config, needed), needed, {_KEY: origin}, notes)
        rows, unreadable = origin.read(columns)
        if places.COLUMN in needed:
            rows, missing = places.identified(rows)
            unreadable = unreadable + missing
        rows, unusable = checking.usable(rows, columns, needed, origin)
    except UserError as error:
        raise UserError(*(_renamed(one) for one in error.mistakes)) from error
    bad = unreadable + unusable
    mistake, note = checking.settled(_KEY, bad, len(rows) + len(bad), config.bad_rows)
    if mistake:
        raise UserError(mistake)
    return rows, [*notes, *([note] if note else [])]


def _plain(config: DataConfig, needed: list[str]) -> DataConfig:
    columns = {name: column for name, column in config.columns.items() if name in needed}
    return DataConfig(source="files", columns=columns, bad_rows=config.bad_rows)


def _origin(path: Path, config: DataConfig, needed: list[str], notes: list[str]) -> Origin:
    if path.is_dir() and places.COLUMN in needed:
        return places.FolderOrigin(path, _KEY, notes)
    if path.is_file() and path.suffix.lower() in places.ENDINGS:
        hint = f"name the folder above those of the classes, such as {path.parent.parent}"
        raise UserError(Mistake(f"{path} is one picture, and a support set has some of each class", SUPPORT, hint=hint))
    return origins.FileOrigin(formats.find(str(path), _KEY), config.format)


def _renamed(mistake: Mistake) -> Mistake:
    """The same in the words of the command line, where no recipe names these rows."""
    key = f"data.files.{_KEY}"
    where = SUPPORT if mistake.where in (key, "") else mistake.where
    return replace(mistake, where=where, hint=mistake.hint.replace(f"{key}=", f"{SUPPORT} "))
