"""Generated SQL, judged by what it returns from a SQLite database (Spider's execution match).

The rows that a query returns are compared as a bag, and in their order where the reference query's outermost SELECT has
an ORDER BY. The official test suite (Zhong et al. 2020) differs: it runs both queries on many databases of the same
tables, so that an accidental match is rarer; it takes DISTINCT out of both by default; it lets the columns come in
another order; and it looks for ORDER BY anywhere in the reference.

A query runs in this process, on a connection that can only read one database. It is the user's own data that is read,
and nothing else can be reached, so this asks for no permission.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from peftcli.config.errors import Mistake, UserError, unknown
from peftcli.config.schema import GenerationConfig
from peftcli.tasks.scoring.contract import Answered, Scored, Scorer
from peftcli.tasks.scoring.text import TextScorer

SECONDS = 10.0
"""A query's time."""
ROWS = 100_000
"""Rows that a query may return."""
CELL = 1_000_000
"""Bytes of a value, and of a query."""
PATTERN = 1000
"""Bytes of the pattern of a LIKE: with long ones a single instruction can take hours."""
MEMORY = 1 << 30
"""Bytes by which this process may grow meanwhile."""
STEPS = 10_000
"""Instructions of SQLite's machine between two looks at the clock."""
LEFT_OUT = "task.databases names no folder: execution_match is left out, and the queries are compared as texts"
READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
"""What a query may do; any function but `load_extension`."""
FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)


class SqlScorer(Scorer):
    """Compares the texts, and given databases what the queries return; then these decide whether a row is right."""

    metrics = TextScorer.metrics

    def __init__(self, config: GenerationConfig):
        super().__init__(config)
        if config.databases is None:
            self.notes, self.judged = (LEFT_OUT,), self.by_first("text (no query was run)")
            return
        self.metrics = ("execution_match", *TextScorer.metrics)
        self.columns = ("database",)
        self.folder = Path(config.databases).expanduser()
        if not self.folder.is_dir():
            what = f"task.databases={config.databases!r} is no folder"
            raise UserError(Mistake(what, "task.databases", hint="it holds DATABASE/DATABASE.sqlite, as Spider does"))

    def score(self, answered: list[Answered]) -> Scored:
        texts = TextScorer(self.config).score(answered)
        if self.config.databases is None:
            return texts
        remarks = [self._differs(answer) for answer in answered]
        right = [not remark for remark in remarks]
        each = [float(is_right) for is_right in right]
        found = {"execution_match": sum(each) / len(each)} | texts.metrics
        rows, proportions = {"execution_match": each} | texts.rows, ("execution_match", *texts.proportions)
        return Scored(found, each, right, rows, proportions, texts.intervals, remarks)

    def _differs(self, answer: Answered) -> str:
        """Why the query does not count as right; empty where it does."""
        path = self._path(str(answer.row["database"]))
        try:
            wanted = run(path, answer.expected)
        except sqlite3.Error as error:
            raise UserError(f"the reference query {answer.expected!r} fails on {path}: {error}") from error
        try:
            found = run(path, extract(answer.written[0]))
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            return f"failed: {error}"
        return "" if same(found, wanted, is_ordered(answer.expected)) else "other rows than the reference returns"

    def _path(self, database: str) -> Path:
        """The database's file; a name that leads out of the folder is no database."""
        path = self.folder / database / f"{database}.sqlite"
        if Path(database).name != database or not path.is_file():
            known = [found.name for found in self.folder.iterdir() if found.is_dir()]
            raise UserError(unknown("database", database, known[:20], "task.databases", f"{path} is not there"))
        return path


def extract(text: str) -> str:
    """The query in what a model has written: out of a fence, up to the first semicolon or empty line."""
    fenced = FENCE.search(text)
    text = (fenced[1] if fenced else text).strip()
    for end in (m.end() for m in re.finditer(";", text)):
        if sqlite3.complete_statement(text[:end]):  # not a semicolon inside of a text
            return text[:end]
    return re.split(r"\n\s*\n", text)[0]


def run(database: Path, query: str) -> list[tuple[Any, ...]]:
    """The rows of one query, which can only read this database.

    Raises:
        sqlite3.Error: It is no query, wants more than to read, takes more than SECONDS or returns more than ROWS.
        ValueError: It holds a character that SQLite does not take.
    """
    connection = sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)
    try:
        connection.text_factory = lambda text: text.decode(errors="replace")  # Spider's data are not all UTF-8
        connection.execute("PRAGMA query_only = on")
        connection.execute("PRAGMA temp_store = memory")  # nothing large is left on disk, and memory is watched
        for limit, most in (
            (sqlite3.SQLITE_LIMIT_LENGTH, CELL),
            (sqlite3.SQLITE_LIMIT_SQL_LENGTH, CELL),
            (sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, PATTERN),
            (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
        ):
            connection.setlimit(limit, most)
        connection.set_authorizer(_may)
        connection.set_progress_handler(_too_much(), STEPS)
        return _rows(connection.execute(query))
    finally:
        connection.close()


def _rows(cursor: sqlite3.Cursor) -> list[tuple[Any, ...]]:
    if cursor.description is None:
        raise sqlite3.OperationalError("no query")
    found, room = [], MEMORY // 4
    for row in cursor:
        found.append(row)
        room -= sum(len(value) for value in row if isinstance(value, str | bytes))
        if len(found) > ROWS or room < 0:
            raise sqlite3.OperationalError(f"more than {ROWS:,} rows, or too long ones")
    return found


def _may(action: int, _first: str | None, second: str | None, *_: str | None) -> int:
    allowed = action in READING and second != "load_extension"
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def _too_much() -> Callable[[], bool]:
    """Whether a query has run too long or taken too much memory since now."""
    process, end = psutil.Process(), time.monotonic() + SECONDS
    most = process.memory_info().rss + MEMORY
    return lambda: time.monotonic() > end or process.memory_info().rss > most


def is_ordered(query: str) -> bool:
    """Whether the outermost SELECT has an ORDER BY: one that stands in no parenthesis and no text."""
    bare = re.sub(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|--[^\n]*|/\*.*?\*/", "x", query, flags=re.DOTALL)
    while (inner := re.sub(r"\([^()]*\)", "x", bare)) != bare:
        bare = inner
    return re.search(r"\border\s+by\b", bare, re.IGNORECASE) is not None


def same(found: list[tuple[Any, ...]], wanted: list[tuple[Any, ...]], ordered: bool) -> bool:
    """Whether two results hold the same rows as often, and in the same order where that matters; 1 is 1.0."""
    return found == wanted if ordered else Counter(found) == Counter(wanted)
