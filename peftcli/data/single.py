"""Rows for a run that is already trained: one split without the others, or a file without answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from peftcli.config.errors import Mistake, UserError, unknown
from peftcli.config.schema import DataConfig
from peftcli.data import checking, formats, origins, sources
from peftcli.data.images import places as pictures
from peftcli.data.rows import Rows


def read_split(config: DataConfig, needed: list[str], split: str) -> tuple[Rows, list[str]]:
    """One split of a recipe's rows, read without the others.

    Args:
        config: The `data` group.
        needed: What the task's templates use.
        split: train, validation or test; where the source has none of that name it is set aside from the training
            rows as in training, and so those are read.

    Returns:
        The rows, as `sources.load` gives them, and what was done that was not asked for word by word.

    Raises:
        UserError: The split is not there, or what `sources.load` complains of.
    """
    own = config.files.get(split)
    if config.source == "domains" or (config.source == "files" and own is None):
        return _among_all(config, needed, split)
    if config.source == "files":
        rows = {key: count for key, count in config.rows.items() if key == split}
        config = replace(config, files={split: own}, rows=rows)
    notes: list[str] = []
    found = origins.find(config, notes)
    if split not in found:
        return _among_all(config, needed, split)
    only = {split: found[split]}
    columns = checking.mapping(config, needed, only, notes)
    read, _ = sources.read(replace(config, streaming=False), only, columns, needed, notes)
    rows = sources.draw(config, split, read[split], notes)
    if len(rows) < len(read[split]):
        notes.append(f"{split}: {len(rows)} of {len(read[split])} rows drawn (data.rows.{split}={len(rows)})")
    return rows, notes


def _among_all(config: DataConfig, needed: list[str], split: str) -> tuple[Rows, list[str]]:
    splits = sources.load(config, needed)
    have = {name: rows for name in origins.SPLITS if isinstance(rows := getattr(splits, name), Rows)}
    if split not in have:
        raise UserError(unknown("split", split, have, where="--split", hint=f"or name one: data.files.{split}=FILE"))
    return have[split], splits.notes


def read_questions(
    path: Path, config: DataConfig, asked: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """The rows of a file as they stand there, and as the task asks about them.

    Args:
        path: A jsonl, csv or parquet file; an ending that tells nothing is read as `data.format`.
        config: The run's `data` group, whose column mapping and `bad_rows` hold here too.
        asked: What the task's templates read; columns that hold answers are not needed.

    Returns:
        The rows with all their columns, the same with the names that the task knows, and notes.

    Raises:
        UserError: The file or a column is missing, or rows are unreadable or empty and not to be skipped.
    """
    [path] = formats.find(str(path), "test")
    form = formats.kind(path, "auto" if path.suffix.lower() in formats.ENDINGS else config.format)
    origin = origins.FileOrigin([path], form)
    notes: list[str] = []
    mapped = {name: column for name, column in config.columns.items() if name in asked}
    columns = checking.mapping(replace(config, columns=mapped), asked, {"input": origin}, notes)
    whole, questions, bad = [], [], []
    for number, (where, row) in enumerate(formats.lines(path, form)):
        if isinstance(row, Mistake):
            bad.append(row)
            continue
        question = {name: row.get(column) for name, column in columns.items()}
        if pictures.COLUMN in question:
            question[pictures.COLUMN] = pictures.at(question[pictures.COLUMN], path.parent)
        if mistake := checking.problem(question, columns, asked, where):
            bad.append(mistake)
            continue
        whole.append(row)
        questions.append({**question, "row": number})
    if bad and (config.bad_rows == "error" or not whole):
        raise UserError(checking.bad_rows("input", bad, len(whole) + len(bad)))
    if bad:
        notes.append(f"left out {checking.some(bad, len(whole) + len(bad))}")
    return whole, questions, notes
