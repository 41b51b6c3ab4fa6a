"""The label set of a run: learnt from the training rows, and held against the other splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from peftcli.config.errors import CheckFailed
from peftcli.data.rows import Rows

HEAD = 1000
"""Rows of a stream that its labels are learnt from."""

Labels = Callable[[Any], Iterable[str]]
"""A cell of the column `label` to the labels in it."""


def one(value: Any) -> tuple[str]:
    """The cell is the label; a number becomes text."""
    return (str(value),)


def count(rows: Any, labels: Labels = one) -> Counter[str]:
    """Rows of each label, of a stream in its first rows."""
    cells = [] if rows is None else rows["label"] if isinstance(rows, Rows) else [r["label"] for r in rows.head(HEAD)]
    return Counter(label for cell in cells for label in labels(cell))


def learn(splits: Any, seen: Counter[str], labels: Labels = one) -> list[str]:
    """The labels in their order, once the other splits are known to have no more.

    Args:
        splits: The rows.
        seen: Training rows of each label.
        labels: Reads a cell.

    Raises:
        CheckFailed: `label-mismatch`: fewer than two labels, or one that only other splits have.
    """
    if len(seen) < 2:
        what = f"all training rows have one label: {', '.join(seen)}"
        raise CheckFailed("label-mismatch", what, "a classifier learns from rows of two labels or more")
    for name in ("validation", "test"):
        other = count(getattr(splits, name), labels)
        if missing := {label: n for label, n in other.items() if label not in seen}:
            listed = ", ".join(f"{label!r} ({n} rows)" for label, n in sorted(missing.items()))
            raise CheckFailed(
                "label-mismatch",
                f"labels of the {name} split that no training row has: {listed}",
                f"labels in training: {', '.join(sorted(seen, key=order))}; take more training rows or drop these",
            )
    return sorted(seen, key=order)


def order(label: str) -> tuple[bool, int, str]:
    """Numbers by size, then names by alphabet."""
    number = label.lstrip("-").isdecimal()
    return (not number, int(label) if number else 0, label)
