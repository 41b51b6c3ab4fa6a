"""A finished run's answers to rows that nobody has answered yet: from a file to a file."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from peftcli.artifacts import atomic
from peftcli.artifacts.tuned import Tuned
from peftcli.config.errors import Mistake, UserError
from peftcli.data.single import read_questions
from peftcli.tasks.layouts import CONVERSATION

ENDINGS = (".jsonl", ".ndjson", ".csv")
CHUNK = 32
"""Batches that are sorted by length together, between two signs of progress."""


def form(output: Path | None) -> str:
    """The format of an output file by its ending; JSON lines where there is no file.

    Raises:
        UserError: The ending names neither.
    """
    if output is not None and output.suffix.lower() not in ENDINGS:
        raise UserError(Mistake(f"the ending of {output} names no format of predictions", allowed=ENDINGS))
    return "csv" if output is not None and output.suffix.lower() == ".csv" else "jsonl"


def answer_file(
    tuned: Tuned, path: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Answer the rows of a file.

    Args:
        tuned: The run.
        path: jsonl, csv or parquet, with the columns that the task's templates read.
        progress: Called with the rows answered so far and all rows.

    Returns:
        The file's rows in their order, each with all its columns and `predicted`, `score` and `probabilities` as far as
        the task has them; and notes.

    Raises:
        UserError: The file or a column is not there, or rows cannot be read or are empty and not to be skipped.
    """
    whole, questions, notes = read_questions(path, tuned.config.data, tuned.task.asked)
    step = CHUNK * tuned.config.training.eval_batch_size
    answers: list[dict[str, Any]] = []
    for at in range(0, len(questions), step):
        answers += answer(tuned, questions[at : at + step])
        progress(len(answers), len(questions))
    if covered := sorted({key for row in whole for key in row} & set(answers[0])):
        notes.append(f"columns of the input that the predictions take the place of: {', '.join(covered)}")
    return [row | found for row, found in zip(whole, answers, strict=True)], notes


def answer_text(tuned: Tuned, text: str) -> dict[str, Any]:
    """Answer one text, the only column of the prompt or the user's turn.

    Raises:
        UserError: The prompt has several columns, or the text is empty.
    """
    if not text.strip():
        raise UserError(Mistake("there is nothing in it", "--text"))
    if len(tuned.task.asked) != 1:
        named = ", ".join(tuned.task.asked)
        raise UserError(Mistake(f"the prompt of this run reads several columns: {named}", "--text", hint="use --input"))
    [name] = tuned.task.asked
    value = [{"role": "user", "content": text}] if name == CONVERSATION else text
    return answer(tuned, [{name: value, "row": 0}])[0]


def answer(tuned: Tuned, questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers to rows by the task's own column names, in their order."""
    found = tuned.task.predict(
        tuned.model,
        questions,
        tuned.tokenizer,
        batch_size=tuned.config.training.eval_batch_size,
        device=tuned.device,
        precision=tuned.precision,
    )
    return [{key: value for key, value in row.items() if key != "input"} for row in found]


def save(rows: list[dict[str, Any]], output: Path) -> None:
    """Write answered rows, as csv or JSON lines by the file's ending. Raises as `atomic.file` does."""
    with atomic.file(output) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        write(rows, file, form(output))


def write(rows: list[dict[str, Any]], file: TextIO, kind: str) -> None:
    """Write answered rows to an open file; in csv a nested value becomes JSON, and probabilities a column a label."""
    if kind == "jsonl":
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        return
    flat = [_flat(row) for row in rows]
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in flat for key in row)))
    writer.writeheader()
    writer.writerows(flat)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in row.items() if key != "probabilities"}
    plain |= {f"probability of {label}": share for label, share in row.get("probabilities", {}).items()}
    return {
        key: json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else value
        for key, value in plain.items()
    }
