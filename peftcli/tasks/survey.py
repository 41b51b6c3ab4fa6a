"""The rows of a recipe as the model will see them, found out without the model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from peftcli.config.errors import CheckFailed, UserError
from peftcli.config.schema import ImageConfig, RunConfig
from peftcli.data import inspect, sources
from peftcli.data.images import survey as pictures
from peftcli.data.rows import Rows
from peftcli.data.stream import Stream
from peftcli.models import loading
from peftcli.tasks.classification import ClassificationTask
from peftcli.tasks.contract import Task
from peftcli.tasks.episodes.pool import Pool
from peftcli.tasks.episodes.task import EpisodesTask
from peftcli.tasks.images.task import ImagesTask
from peftcli.tasks.prompts import Template
from peftcli.tasks.registry import build

STREAMED = 10_000
"""Rows of a stream that are looked at."""
SHOWN = 3


@dataclass
class Survey:
    """What `peft data` prints.

    Attributes:
        rows: What `peftcli.data.inspect.describe` finds, with `skipped`, `fingerprint` and `notes`.
        tokens: By split what `Task.encode_split` counts, and `lengths`, a histogram in tokens.
        shown: The first training rows as the model sees them, as rich texts.
        sheets: Contact sheets of pictures, PNG files by what they show.
        error: What would stop training, if anything does.
    """

    rows: dict[str, Any]
    tokens: dict[str, dict[str, Any]] = field(default_factory=dict)
    shown: list[Any] = field(default_factory=list)
    sheets: dict[str, bytes] = field(default_factory=dict)
    error: UserError | CheckFailed | None = None


def survey(config: RunConfig) -> Survey:
    """Load, count and encode the rows of a recipe; bad rows are left out and counted whatever the recipe says.

    Raises:
        UserError: The rows cannot be read at all.
    """
    task = build(config.task)
    splits = sources.load(replace(config.data, bad_rows="skip"), task.needed)
    train = splits.train
    if isinstance(train, Stream):
        stream, train = train, Rows.from_list(train.head(STREAMED))
        splits = replace(splits, train=train)
        splits.notes.append(f"looked at the first {len(train)} rows of the stream")
        if stream.skipped:
            splits.counts["skipped"]["train"] = {"unreadable or empty": stream.skipped}
    named = {"train": train, "validation": splits.validation, "test": splits.test}
    present = {name: rows for name, rows in named.items() if rows is not None}
    if isinstance(task, ImagesTask) or (isinstance(task, EpisodesTask) and task.pictures):
        return _pictures(task, splits, present)
    assert not isinstance(config.task, ImageConfig)
    asked = [name for name in Template(config.task.prompt, "task.prompt").columns if name in task.needed]
    rows = inspect.describe(present, asked or task.needed)
    rows["notes"] = splits.notes + rows["notes"]
    found = Survey({"fingerprint": splits.fingerprint, "skipped": splits.counts["skipped"], **rows})
    try:
        task.fit(splits)
        _encode(found, task, present, config)
    except (UserError, CheckFailed) as error:
        found.error = error
    return found


def _pictures(task: ImagesTask | EpisodesTask, splits: sources.Splits, present: dict[str, Rows]) -> Survey:
    """Nothing is encoded: what a model sees of a picture is the picture."""
    several = isinstance(task, EpisodesTask)
    present = {name: _with_domains(rows) for name, rows in present.items()} if several else present
    error = None
    try:
        task.fit(splits)
    except (UserError, CheckFailed) as mistake:
        error = mistake
    rows, sheets = pictures.describe(present, task.labels_of, "error" if several else task.config.animated)
    rows["notes"] = splits.notes + rows["notes"]
    skipped = {split: dict(reasons) for split, reasons in splits.counts["skipped"].items()}
    for split, problems in rows["problems"].items():
        for problem in problems:
            told, why = skipped.setdefault(split, {}), f"picture is {problem['kind']}"
            told[why] = told.get(why, 0) + 1
    return Survey({"fingerprint": splits.fingerprint, "skipped": skipped, **rows}, sheets=sheets, error=error)


def _with_domains(rows: Rows) -> Rows:
    """Classes of different domains are different ones, whatever their names."""
    names = [f"{domain} {label}" for domain, label in zip(rows["domain"], rows["label"], strict=True)]
    table = rows.table
    return Rows(table.set_column(table.column_names.index("label"), "label", pa.array(names)))


def _encode(found: Survey, task: Task, splits: dict[str, Rows], config: RunConfig) -> None:
    tokenizer = loading.tokenizer(config.model)
    if tokenizer is None:
        found.rows["notes"].append("the model has random weights and no tokenizer: nothing is counted in tokens")
        return
    if isinstance(task, ClassificationTask) and (shortened := task.shortened(tokenizer)):
        named = [f"{label!r} by {first!r}" for label, first in list(shortened.items())[:SHOWN]]
        found.rows["notes"].append(
            "a label is scored by the first token of its word, which is enough to tell the labels apart: "
            + ", ".join(named + ["..."] * (len(shortened) > SHOWN))
        )
    for name, rows in splits.items():
        encoded = task.encode_split(rows, tokenizer)
        if isinstance(encoded, Pool):
            found.shown += [task.show(row, tokenizer) for row in encoded.take(range(SHOWN))]
            continue
        found.tokens[name] = {**encoded.counts, "lengths": inspect.histogram(encoded.lengths)}
        if name == "train":
            found.shown = [task.show(row, tokenizer) for row in encoded.take(range(min(SHOWN, len(encoded))))]
