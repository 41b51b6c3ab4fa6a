"""From a recipe's `data` group to the rows of the splits.

Where rows come from is `origins.py` and `formats.py`; here they are checked, split, drawn and fingerprinted.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

from peftcli.config.errors import Mistake, UserError, unknown
from peftcli.config.schema import DataConfig
from peftcli.data import checking, domains, origins, splitting
from peftcli.data.images import copies
from peftcli.data.images.places import COLUMN, identified
from peftcli.data.origins import SPLITS, Origin
from peftcli.data.rows import Rows
from peftcli.data.stream import Stream

WHERE = "where "
"""Before the names of columns that are read for `data.where` alone."""
MOST_VALUES = 20
"""Values of a column that a message lists."""


@dataclass(frozen=True)
class Splits:
    """The rows of a run.

    Attributes:
        train: Rows to learn from; a `Stream` with `data.streaming`.
        validation: Rows to choose by, or None.
        test: Rows to report on, or None.
        fingerprint: SHA-256 of the rows used, in their order, after splitting and drawing.
        counts: Rows used by split, and under `skipped` the bad rows left out, by split of the source and reason.
        notes: What was done that the recipe did not ask for word by word, for the log and the report.
    """

    train: Rows | Stream
    validation: Rows | None
    test: Rows | None
    fingerprint: str
    counts: dict[str, Any]
    notes: list[str]


def load(config: DataConfig, needed: list[str]) -> Splits:
    """Read, check, split and draw the rows.

    Args:
        config: The recipe's `data` group.
        needed: What the task's templates use: `text`, `label`, `prompt`, ... or columns by their own names.

    Returns:
        Splits with a column for each needed name, for each other key of `data.columns`, and `row`, the position
        in the source split, from 0.

    Raises:
        UserError: Missing files or columns, bad rows (unless they are skipped), empty splits.
    """
    notes: list[str] = []
    _check_numbers(config)
    if config.source == "domains":
        splits, skipped = domains.read(config, needed, notes)
    else:
        splits, skipped = _of_one_source(config, needed, notes)
    for split, rows in splits.items():
        splits[split] = draw(config, split, rows, notes)
    prints = "\n".join(f"{split} {splits[split].fingerprint()}" for split in SPLITS if split in splits)
    counts = {split: len(rows) for split, rows in splits.items() if isinstance(rows, Rows)}
    return Splits(
        train=splits["train"],
        validation=splits.get("validation"),
        test=splits.get("test"),
        fingerprint=hashlib.sha256(prints.encode()).hexdigest(),
        counts={**counts, "skipped": skipped},
        notes=notes,
    )


def _of_one_source(
    config: DataConfig, needed: list[str], notes: list[str]
) -> tuple[dict[str, Any], dict[str, dict[str, int]]]:
    found = origins.find(config, notes)
    if "train" not in found:
        have = ", ".join(found) or "none of the three"
        raise UserError(Mistake(f"no train split; there is {have}", "data", hint="name it: data.splits.train=NAME"))
    if lost := [split for split in config.where if split not in found]:
        what = f"the source has no {lost[0]} split of its own; rows set aside for it are those of train"
        raise UserError(Mistake(what, f"data.where.{lost[0]}", hint="give data.where.train alone"))
    columns = checking.mapping(config, needed, found, notes)
    splits, skipped = read(config, found, columns, needed, notes)
    if COLUMN in needed:
        copies.crossing(splits, notes)
    _set_aside(config, splits, notes)
    return splits, skipped


def _check_numbers(config: DataConfig) -> None:
    shares = {"validation": config.validation_share, "test": config.test_share}
    mistakes = [
        Mistake(f"data.{name}_share={share} is not a share", f"data.{name}_share", ("0 to below 1",))
        for name, share in shares.items()
        if not 0 <= share < 1
    ]
    if not mistakes and sum(shares.values()) >= 1:
        mistakes.append(Mistake(f"shares of {sum(shares.values()):g} leave no training rows", "data.validation_share"))
    mistakes += [
        Mistake(f"data.rows.{split}={count} is no number of rows", f"data.rows.{split}", ("1 or more",))
        for split, count in config.rows.items()
        if count < 1
    ]
    if mistakes:
        raise UserError(*mistakes)


def read(
    config: DataConfig, found: dict[str, Origin], columns: dict[str, str], needed: list[str], notes: list[str]
) -> tuple[dict[str, Any], dict[str, dict[str, int]]]:
    """The splits' rows as they are, without those that cannot be used, and how many those were, by split and reason.

    Raises:
        UserError: Bad rows (unless they are skipped), empty splits.
    """
    splits: dict[str, Any] = {}
    skipped: dict[str, dict[str, int]] = {}
    mistakes: list[Mistake] = []
    for split, origin in found.items():
        if split == "train" and config.streaming:
            splits[split] = Stream(origin, columns, needed, config.bad_rows, config.rows.get(split))
            notes.append("train is streamed: its fingerprint is that of names, sizes and beginnings, not of every row")
            continue
        conditions = config.where.get(split, {})
        rows, unreadable = origin.read(columns | {f"{WHERE}{column}": column for column in conditions})
        rows = _keep(rows, split, conditions, mistakes)
        if COLUMN in needed:
            rows, missing = identified(rows)
            unreadable = unreadable + missing
        rows, unusable = checking.usable(rows, columns, needed, origin)
        bad, total = unreadable + unusable, len(rows) + len(unreadable) + len(unusable)
        mistake, note = checking.settled(split, bad, total, config.bad_rows)
        if mistake:
            mistakes.append(mistake)
        elif bad:
            skipped[split] = dict(Counter(b.what.split(":")[0] for b in bad))
            notes.append(note)
        elif total == 0:
            mistakes.append(Mistake(f"{split} has no rows", origin.where))
        splits[split] = rows
    if mistakes:
        raise UserError(*mistakes)
    return splits, skipped


def _keep(rows: Rows, split: str, conditions: dict[str, Any], mistakes: list[Mistake]) -> Rows:
    """The rows that `data.where` asks for, without the columns that it alone needs."""
    for column, wanted in conditions.items():
        values = [str(value) for value in (wanted if isinstance(wanted, list) else [wanted])]
        have = sorted(set(map(str, rows[WHERE + column])))
        strange = [value for value in values if value not in have]
        mistakes += [unknown("value", v, have[:MOST_VALUES], f"data.where.{split}.{column}") for v in strange]
        if not strange:
            rows = splitting.keep(rows, WHERE + column, values)
    return Rows(rows.table.drop_columns([WHERE + column for column in conditions]))


def _set_aside(config: DataConfig, splits: dict[str, Any], notes: list[str]) -> None:
    """Cut the validation and test rows that the source does not have from the training rows, in place."""
    shares = {"test": config.test_share, "validation": config.validation_share}
    shares = {split: share for split, share in shares.items() if split not in splits and share > 0}
    if not shares:
        return
    if isinstance(splits["train"], Stream):
        names = " or ".join(shares)
        notes.append(f"no {names} rows: none are set aside from a stream; give it such a split to have some")
        return
    if len(splits["train"]) <= len(shares):
        what = f"{len(splits['train'])} training rows cannot be split into train, {', '.join(shares)}"
        raise UserError(Mistake(what, "data.validation_share", hint="more rows, or data.validation_share=0"))
    together = copies.groups(splits["train"], notes) if COLUMN in splits["train"].column_names else []
    splits |= splitting.set_aside(splits["train"], shares, config.seed, together)
    for split, share in shares.items():
        if not len(splits[split]):
            what = f"no rows can be set aside for {split}: those of a label are copies of each other"
            raise UserError(Mistake(what, f"data.{split}_share", hint=f"more pictures, or data.{split}_share=0"))
        notes.append(f"{split}: {len(splits[split])} rows set aside from train (data.{split}_share={share:g})")


def draw(config: DataConfig, split: str, rows: Any, notes: list[str]) -> Any:
    """As many of a split's rows as `data.rows` asks for."""
    wanted = config.rows.get(split)
    if wanted is None or isinstance(rows, Stream):
        return rows
    if wanted >= len(rows):
        notes.append(f"{split}: all {len(rows)} rows are used (data.rows.{split}={wanted} asks for as many or more)")
        return rows
    return splitting.draw(rows, wanted, config.seed, split)
