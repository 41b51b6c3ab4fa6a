"""Which experts the tasks of each domain chose: a table of shades, and the tree of domains that chose alike.

D domains, M experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftcli.reports import units
from peftcli.reports.figures import FIRST, INK, QUIET, Drawing, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WRITTEN = 8
"""Experts up to which each cell also has its number."""
TREE = 0.35
"""Width of the tree over that of the table."""


@dataclass(frozen=True)
class Node:
    """A domain, or two nodes that were joined.

    Attributes:
        leaves: Numbers of its domains, from top to bottom.
        height: Mean distance of the two parts; 0 of a domain.
        parts: The two; none of a domain.
    """

    leaves: tuple[int, ...]
    height: float = 0.0
    parts: tuple[Node, ...] = ()


def distance(first_M: list[float], second_M: list[float]) -> float:
    """Half the sum of the differences of two sets of weights: 0 where they are the same, 1 where they share nothing."""
    return sum(abs(a - b) for a, b in zip(first_M, second_M, strict=True)) / 2


def tree(rows_DM: list[list[float]]) -> Node:
    """Hierarchical clustering by the mean distance of the members (average linkage)."""
    nodes = [Node((d,)) for d in range(len(rows_DM))]

    def apart(a: Node, b: Node) -> float:
        pairs = [(i, j) for i in a.leaves for j in b.leaves]
        return sum(distance(rows_DM[i], rows_DM[j]) for i, j in pairs) / len(pairs)

    while len(nodes) > 1:
        pairs = [(apart(a, b), i, j) for i, a in enumerate(nodes) for j, b in enumerate(nodes) if i < j]
        height, i, j = min(pairs)
        a, b = nodes[i], nodes[j]
        joined = Node(a.leaves + b.leaves, height, (a, b))
        nodes = [joined, *(node for k, node in enumerate(nodes) if k not in (i, j))]
    return nodes[0]


def chosen(tasks: dict[str, list[list[float]]]) -> Drawing | None:
    """The drawing; None where there is nothing to choose or to compare.

    Args:
        tasks: Weights of the experts for each task of a domain, by domain.
    """
    names = list(tasks)
    rows_DM = [[sum(one) / len(part) for one in zip(*part, strict=True)] for part in tasks.values()]
    if len(names) < 2 or len(rows_DM[0]) < 2:
        return None
    root = tree(rows_DM)
    count, even = len(rows_DM[0]), 1 / len(rows_DM[0])
    near = next(node for node in _below(root) if len(node.leaves) == 2)
    top, at, m = max((value, d, m) for d, row in enumerate(rows_DM) for m, value in enumerate(row))
    caption = (
        f"Mean weight of each expert on the tasks of a domain; an equal share is {units.percent(even)}. The strongest "
        f"is expert {m + 1} on {names[at]}, {units.percent(top)}. Most alike choose "
        f"{' and '.join(names[d] for d in near.leaves)}; domains that join far to the right choose differently."
    )

    def paint(axes: Axes) -> None:
        _table(axes, [rows_DM[d] for d in root.leaves])
        _branch(axes, root, {d: y + 0.5 for y, d in enumerate(root.leaves)}, count + 0.15, TREE * count / root.height)
        axes.grid(visible=False)
        axes.set(xlim=(0, count * (1 + TREE) + 0.3), ylim=(len(names), 0), xlabel="expert")
        axes.set_xticks([m + 0.5 for m in range(count)], [str(m + 1) for m in range(count)])
        axes.set_yticks([y + 0.5 for y in range(len(names))], [names[d] for d in root.leaves])
        axes.xaxis.set_label_coords(0.5 / (1 + TREE), -0.16)

    if root.height == 0:  # every task has the same weights, so there is no tree
        return None
    drawing = draw(paint, "experts", f"Experts by domain. {caption}", height=max(2.4, 1.1 + 0.32 * len(names)))
    return Drawing("Experts that the tasks chose", caption, drawing)


def _below(node: Node) -> list[Node]:
    """A node and all in it, the lowest joints first."""
    found = [node, *(one for part in node.parts for one in _below(part))]
    return sorted(found, key=lambda one: one.height)


def _table(axes: Axes, rows: list[list[float]]) -> None:
    from matplotlib.patches import Rectangle

    most = max(map(max, rows))
    for y, row in enumerate(rows):
        for m, value in enumerate(row):
            axes.add_patch(Rectangle((m, y), 1, 1, facecolor=FIRST, alpha=0.04 + 0.6 * value / most, lw=0))
            if len(row) <= WRITTEN:
                axes.text(m + 0.5, y + 0.5, f"{100 * value:.0f}", ha="center", va="center", color=INK, fontsize=9)


def _branch(axes: Axes, node: Node, y_of: dict[int, float], left: float, scale: float) -> float:
    """Draw a node's lines and return the middle of it."""
    if not node.parts:
        return y_of[node.leaves[0]]
    x = left + node.height * scale
    ends = [_branch(axes, part, y_of, left, scale) for part in node.parts]
    for part, y in zip(node.parts, ends, strict=True):
        axes.plot([left + part.height * scale, x], [y, y], color=QUIET, linewidth=1)
    axes.plot([x, x], ends, color=QUIET, linewidth=1)
    return sum(ends) / 2
