"""How a classifier's answers look: which classes it takes for which, how sure it is and may be, its worst mistakes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from peftcli.reports import experts, units
from peftcli.reports.figures import FIRST, INK, QUIET, Drawing, draw, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_CLASSES = 20
"""A larger table of confusions could not be read on a phone; the most frequent mistakes are listed anyway."""
WRITTEN = 10
"""Classes up to which each cell also has its number."""
NAME = 14
PICTURE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]+={0,2}")
"""The only source of a picture on the page: nothing is fetched, and no other kind of file is opened."""


def figures(answers: dict[str, Any]) -> list[Drawing]:
    """The drawings of `quality.answers` in report.json, if there: `confusion` (labels, counts), `reliability` and
    `experts`."""
    drawn = []
    with style():
        confusion, bins = answers.get("confusion") or {}, answers.get("reliability") or []
        if confusion.get("counts") and 1 < len(confusion["labels"]) <= MOST_CLASSES:
            drawn.append(_confusion([str(label) for label in confusion["labels"]], confusion["counts"]))
        if bins:
            drawn.append(_reliability(bins))
        if answers.get("experts") and (drawing := experts.chosen(answers["experts"])):
            drawn.append(drawing)
    return drawn


def _confusion(labels: list[str], counts: list[list[int]]) -> Drawing:
    """Shades are shares of a row, so that a rare class is seen as well as a frequent one."""
    from matplotlib.patches import Rectangle

    size = len(labels)
    missed = sorted(
        ((counts[y][x], y, x) for y in range(size) for x in range(size) if x != y and counts[y][x]), reverse=True
    )
    right = sum(counts[i][i] for i in range(size))
    caption = f"A row for each true class, a column for each answer; {right:,} of {sum(map(sum, counts)):,} are right."
    if missed:
        times, y, x = missed[0]
        caption += f" Most often {labels[y]} was taken for {labels[x]}: {times:,} of {sum(counts[y]):,}."

    def paint(axes: Axes) -> None:
        for y, row in enumerate(counts):
            for x, count in enumerate(row):
                if count:
                    axes.add_patch(Rectangle((x, y), 1, 1, facecolor=FIRST, alpha=0.08 + 0.52 * count / sum(row), lw=0))
                if count and size <= WRITTEN:
                    axes.text(x + 0.5, y + 0.5, f"{count:,}", ha="center", va="center", color=INK, fontsize=9)
        axes.grid(visible=False)
        axes.set(xlim=(0, size), ylim=(size, 0), xlabel="answered", ylabel="true")
        places = [i + 0.5 for i in range(size)]
        names = [label if len(label) <= NAME else f"{label[: NAME - 1]}…" for label in labels]
        axes.set_xticks(places, names, rotation=0 if size * max(map(len, names)) < 40 else 90)
        axes.set_yticks(places, names)

    drawing = draw(
        paint, "confusion", f"Table of true classes and answers. {caption}", height=max(2.7, 1.6 + 0.26 * size)
    )
    return Drawing("Which classes are taken for which", caption, drawing)


def _reliability(bins: list[dict[str, float]]) -> Drawing:
    rows = sum(one["rows"] for one in bins)
    error = sum(one["rows"] * abs(one["confidence"] - one["accuracy"]) for one in bins) / rows
    surer = sum(one["rows"] * (one["confidence"] - one["accuracy"]) for one in bins) / rows
    tone = "surer than it is right" if surer > 0 else "less sure than it is right"
    caption = f"On the line, confidence is deserved. Mean gap {units.percent(error)}; on the whole it is {tone}."
    most = max(one["rows"] for one in bins)

    def paint(axes: Axes) -> None:
        axes.plot([0, 100], [0, 100], color=QUIET, linewidth=0.9, linestyle=(0, (2, 3)))
        axes.plot([100 * b["confidence"] for b in bins], [100 * b["accuracy"] for b in bins], color=FIRST, linewidth=1)
        sizes = [12 + 90 * b["rows"] / most for b in bins]
        axes.scatter([100 * b["confidence"] for b in bins], [100 * b["accuracy"] for b in bins], sizes, color=FIRST)
        axes.set(xlabel="confidence (%)", xlim=(0, 103), ylim=(0, 103))

    drawing = draw(paint, "reliability", f"Share answered rightly over confidence. {caption}")
    return Drawing("Right answers by confidence (%)", f"{caption} Larger points stand for more rows.", drawing)


def worst(answers: dict[str, Any]) -> list[dict[str, str]]:
    """The pictures of `quality.answers.worst` for the page: `picture` (a data URI), `name`, `expected`, `tuned`.

    Also `score`, in percent. A row whose picture is not a PNG inside the text is left out.
    """
    return [
        {
            "picture": row["picture"],
            "name": str(row.get("input") or f"row {row.get('row')}"),
            "expected": str(row.get("expected")),
            "tuned": str(row.get("predicted")),
            "score": units.percent(row["score"]) if isinstance(row.get("score"), float) else "",
        }
        for row in answers.get("worst") or []
        if isinstance(row.get("picture"), str) and PICTURE.fullmatch(row["picture"])
    ]
