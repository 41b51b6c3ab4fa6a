"""A finished run's answers to pictures: those of a folder, or those that the rows of a file name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from peftcli.artifacts.tuned import Tuned
from peftcli.config.errors import Mistake, UserError
from peftcli.config.schema import ImageConfig
from peftcli.data import checking
from peftcli.data.ahead import ahead
from peftcli.data.images import places
from peftcli.data.images.decode import ImageProblem, read
from peftcli.data.images.prepared import source, workers
from peftcli.data.single import read_questions


@dataclass
class Pace:
    """How fast the answers came.

    Attributes:
        pictures: How many were answered.
        seconds: All of it, with reading and decoding.
        of_batch: Seconds of each batch in the model alone, its pictures decoded.
        batch_size: Pictures at once.
    """

    batch_size: int
    pictures: int = 0
    seconds: float = 0.0
    of_batch: list[float] = field(default_factory=list)

    def plain(self) -> dict[str, float | int]:
        """As numbers by name: the latency is the median of a batch, in milliseconds."""
        return {
            "pictures": self.pictures,
            "seconds": round(self.seconds, 4),
            "pictures_per_second": round(self.pictures / max(self.seconds, 1e-9), 2),
            "batch_size": self.batch_size,
            "batch_milliseconds": round(1000 * median(self.of_batch), 3),
        }

    def __str__(self) -> str:
        told = self.plain()
        return (
            f"{told['pictures_per_second']:,.1f} pictures/s, decoding included; the model takes "
            f"{told['batch_milliseconds']:,.1f} ms for a batch of {self.batch_size} (median)"
        )


def answer_pictures(
    tuned: Tuned, path: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[list[dict[str, Any]], list[str], Pace]:
    """Answer every picture below a folder, a single picture, or the pictures of a file's rows.

    Args:
        tuned: The run.
        path: A folder, a picture, or jsonl, csv or parquet with the column of pictures.
        progress: Called with the pictures answered so far and all pictures.

    Returns:
        Rows in their order: `image`, the picture's path, in front of a file's other columns; then `predicted`, `score`
        and `probabilities`. Notes, and how fast it went.

    Raises:
        UserError: There are no pictures, or some cannot be read and are not to be skipped.
    """
    whole, questions, bad, notes = _asked(tuned, path)
    began, size = time.perf_counter(), tuned.config.training.eval_batch_size
    pace, rows, total = Pace(size), [], len(questions) + len(bad)
    parts = ahead(lambda part: _decoded(tuned, part), _parts(questions, whole, size), workers())
    for part, problems in parts:
        bad += problems
        if part:
            started = time.perf_counter()
            found = tuned.task.predict(
                tuned.model, [question for question, _ in part], tuned.tokenizer, batch_size=size, device=tuned.device,
                precision=tuned.precision,
            )  # fmt: skip
            pace.of_batch.append(time.perf_counter() - started)
            rows += [
                {places.COLUMN: None} | other | {places.COLUMN: answer.pop("input")} | answer
                for (_, other), answer in zip(part, found, strict=True)
            ]
        progress(len(rows) + len(bad), total)
    mistake, note = checking.settled("input", bad, total, tuned.config.data.bad_rows)
    if mistake:
        raise UserError(mistake)
    pace.pictures, pace.seconds = len(rows), time.perf_counter() - began
    if covered := sorted({key for row in whole for key in row} & set(rows[0])):
        notes.append(f"columns of the input that the predictions take the place of: {', '.join(covered)}")
    return rows, [*notes, *([note] if note else [])], pace


def _asked(tuned: Tuned, path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[Mistake], list[str]]:
    """Other columns of each row, the rows as the task asks about them, what is wrong with others, and notes."""
    if not path.is_dir() and path.suffix.lower() not in places.ENDINGS:
        whole, questions, notes = read_questions(path, tuned.config.data, tuned.task.asked)
        column = tuned.config.data.columns.get(places.COLUMN, places.COLUMN)
        return [{k: v for k, v in row.items() if k != column} for row in whole], questions, [], notes
    folder = path if path.is_dir() else path.parent
    found, others = places.files(path) if path.is_dir() else ([path], [])
    if not found:
        raise UserError(Mistake(f"no pictures below {path}", "--input", places.ENDINGS))
    bad = [mistake for file in found if (mistake := places.problem(file))]
    named = [file for file in found if not places.problem(file)]
    pictures = [places.at(file.relative_to(folder).as_posix(), folder) for file in named]
    notes = [f"{len(others)} files are no pictures: {places.listed(others, folder)}"] if others else []
    return [{} for _ in named], [{places.COLUMN: one, "row": i} for i, one in enumerate(pictures)], bad, notes


Part = list[tuple[dict[str, Any], dict[str, Any]]]
"""Rows as the task asks about them, each with its other columns."""


def _parts(questions: list[dict[str, Any]], whole: list[dict[str, Any]], size: int) -> Iterator[Part]:
    pairs = iter(zip(questions, whole, strict=True))
    while part := list(islice(pairs, size)):
        yield part


def _decoded(tuned: Tuned, part: Part) -> tuple[Part, list[Mistake]]:
    """The rows with their pixels, without those whose picture cannot be used."""
    good, bad, task = [], [], tuned.config.task
    animated = task.animated if isinstance(task, ImageConfig) else "error"
    for question, other in part:
        picture = question[places.COLUMN]
        try:
            pixels = tuned.tokenizer.fit(read(source(picture), animated))
        except ImageProblem as problem:
            where = picture.get("file") or places.name(picture, question["row"])
            bad.append(Mistake(f"picture is {problem}", where))
            continue
        good.append(({**question, places.COLUMN: {"path": picture["path"]}, "pixels": pixels}, other))
    return good, bad
