"""Setting rows aside and drawing from them, by `data.seed` alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np

from peftcli.data.rows import Rows
from peftcli.data.sampler import generator


def set_aside(rows: Rows, shares: dict[str, float], seed: int) -> dict[str, Rows]:
    """Cut parts off the training rows.

    With a column `label` of few values each part has its share of each class, and the last row of a class stays
    in training. Rows keep the source's order within their part.

    Args:
        rows: The training rows.
        shares: Part of `rows` for each name, together below 1; a part has at least one row.
        seed: `data.seed`.

    Returns:
        The parts by name, and what is left as `train`.
    """
    order = generator("split", seed).permutation(len(rows))
    labels = rows["label"] if "label" in rows.column_names else [None] * len(rows)
    if any(not isinstance(label, Hashable) for label in labels) or 2 * len(set(labels)) > len(labels):
        labels = [None] * len(rows)
    classes: dict[Hashable, list[int]] = defaultdict(list)
    for i in order.tolist():
        classes[labels[i]].append(i)
    parts = {}
    for name, share in shares.items():
        sizes = _sizes([len(members) for members in classes.values()], max(1, round(share * len(rows))))
        taken = [members.pop() for members, size in zip(classes.values(), sizes, strict=True) for _ in range(size)]
        parts[name] = rows.select(sorted(taken))
    return parts | {"train": rows.select(sorted(i for members in classes.values() for i in members))}


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
