"""What a scorer is to the generation task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peftcli.config.schema import GenerationConfig


@dataclass(frozen=True)
class Answered:
    """A row and what was written for it."""

    row: Mapping[str, Any]
    """The scorer's columns of the row, by role."""
    expected: str
    """The completion that the row holds."""
    written: list[str]
    """One text, or several samples."""


@dataclass(frozen=True)
class Scored:
    """What the written texts of some rows are worth."""

    metrics: dict[str, float]
    """Means over rows."""
    scores: list[float]
    """Each row's own score, 0 to 1."""
    right: list[bool]
    """Whether each row counts as answered correctly."""
    rows: dict[str, list[float]] = field(default_factory=dict)
    """Each row's value of those metrics that are means over rows; their 95 % intervals are made from these."""
    proportions: tuple[str, ...] = ()
    """Those of `rows` in which a row is right or wrong, so that a binomial interval holds."""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """95 % intervals of metrics that are no means over rows, such as BLEU of a corpus."""
    remarks: list[str] = field(default_factory=list)
    """Why each row is not right, in a line, from scorers that know."""


def means(rows: Mapping[str, list[float]]) -> dict[str, float]:
    """Of each metric over its rows."""
    return {name: sum(values) / len(values) for name, values in rows.items()}


class Scorer(ABC):
    """Judges generated texts.

    Args:
        config: The task's group of the recipe; a scorer checks its own settings and raises UserError.

    Attributes:
        metrics: Names it measures; any may be `task.best_metric`.
        columns: Columns of a row that it needs beside those of the templates, by role.
        notes: What it leaves out, and why.
        judged: What the answers are judged as here, for the report.
    """

    metrics: tuple[str, ...]
    columns: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __init__(self, config: GenerationConfig):
        self.config = config
        self.judged = self.by_first(config.scoring)

    def by_first(self, judged: str) -> str:
        """What answers are judged as where only the first of a row's samples is looked at."""
        samples = self.config.samples
        return judged if samples == 1 else f"{judged}, the first of {samples} samples alone"

    def check(self, completions: list[str]) -> None:
        """Look at the completions of the first training rows.

        Raises:
            UserError: No answer could ever be right by them.
        """

    def by_leading(self, rows: dict[str, list[float]], otherwise: str) -> Scored:
        """Of metrics that are right or wrong row by row: a row is right by the best metric of the task, if it is one of
        them, else by another."""
        leading = rows[self.config.best_metric if self.config.best_metric in rows else otherwise]
        return Scored(means(rows), leading, [bool(value) for value in leading], rows, self.metrics)

    @abstractmethod
    def score(self, answered: list[Answered]) -> Scored:
        """Score the rows; the same result every time."""
