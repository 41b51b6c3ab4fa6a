"""Setting rows aside and drawing from them, by `data.seed` alone, and keeping those of certain values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Sequence

import numpy as np

from peftcli.data.rows import Rows
from peftcli.data.sampler import generator


def set_aside(
    rows: Rows, shares: dict[str, float], seed: int, together: Sequence[Sequence[int]] = ()
) -> dict[str, Rows]:
    """Cut parts off the training rows.

    With a column `label` of few values each part has its share of each class, and the last row of a class stays
    in training. Rows keep the source's order within their part.

    Args:
        rows: The training rows.
        shares: Part of `rows` for each name, together below 1; a part has at least one row, where groups allow it.
        seed: `data.seed`.
        together: Groups of rows, by position, that must not be torn apart: copies of each other.

    Returns:
        The parts by name, and what is left as `train`.
    """
    group = {i: members for members in together for i in members}
    order = generator("split", seed).permutation(len(rows))
    labels = rows["label"] if "label" in rows.column_names else [None] * len(rows)
    if any(not isinstance(label, Hashable) for label in labels) or 2 * len(set(labels)) > len(labels):
        labels = [None] * len(rows)
    classes: dict[Hashable, list[Sequence[int]]] = defaultdict(list)
    for i in order.tolist():
        members = group.get(i, (i,))
        if i == members[0]:  # a group goes by its first row
            classes[labels[i]].append(members)
    parts = {}
    for name, share in shares.items():
        left = [sum(map(len, groups)) for groups in classes.values()]
        sizes = _sizes(left, max(1, round(share * len(rows))))
        taken = [_take(groups, size) for groups, size in zip(classes.values(), sizes, strict=True)]
        parts[name] = rows.select(sorted(i for part in taken for i in part))
    return parts | {"train": rows.select(sorted(i for groups in classes.values() for one in groups for i in one))}


def _take(groups: list[Sequence[int]], wanted: int) -> list[int]:
    """Rows of the last groups, taken out of the list: at most `wanted`, and never the class's first group."""
    taken: list[int] = []
    for at in range(len(groups) - 1, 0, -1):
        if len(groups[at]) <= wanted - len(taken):
            taken += groups.pop(at)
    return taken


def _sizes(left: Sequence[int], wanted: int) -> list[int]:
    """Rows to take of each class: in proportion, whole, `wanted` over all, and never a class's last row."""
    exact = np.array(left) * wanted / sum(left)
    sizes = np.minimum(np.floor(exact).astype(int), np.array(left) - 1)
    for c in np.argsort(-(exact - sizes), kind="stable"):
        if sizes.sum() < wanted and sizes[c] < left[c] - 1:
            sizes[c] += 1
    return sizes.tolist()


def draw(rows: Rows, count: int, seed: int, split: str) -> Rows:
    """`count` rows at random in the source's order; a smaller draw by the same seed is part of a larger one."""
    return rows.select(sorted(generator("draw", split, seed).permutation(len(rows))[:count].tolist()))


def keep(rows: Rows, column: str, values: Collection[str]) -> Rows:
    """The rows in which a column, read as text, has one of these values."""
    return rows.select([i for i, value in enumerate(rows[column]) if str(value) in values])
