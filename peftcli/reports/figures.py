"""The figures of the page: SVG whose text stays text and whose colours are the page's own variables.

Every figure is drawn for one column of a phone (360 points wide), so that its text is readable there and grows beside.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from peftcli.reports import quality, units
from peftcli.reports.svg import inline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
# Placeholders that no other colour equals: svg.inline turns them into the page's variables, light or dark.
INK, QUIET, RULE, FIRST, SECOND, THIRD = (f"#00000{digit}" for digit in range(1, 7))
VARIABLES = {INK: "--ink", QUIET: "--quiet", RULE: "--rule", FIRST: "--tuned", SECOND: "--second", THIRD: "--third"}
SERIES = (FIRST, SECOND, THIRD, QUIET)
MOST_POINTS = 1200
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "peftcli",
    "figure.figsize": (5.0, 2.7),
    "font.size": 11,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": RULE,
    "axes.labelcolor": QUIET,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.formatter.useoffset": False,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "ytick.left": False,
    "ytick.minor.left": False,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "legend.borderaxespad": 0.1,
    "path.simplify_threshold": 0.3,
}


ROW_OF_LABELS = 60
"""Characters of a legend, with its marks, that fit beside each other."""


@dataclass(frozen=True)
class Drawing:
    """A figure as the page shows it.

    Attributes:
        title: What is drawn, with its unit.
        caption: What the eye should find, in words; also the description for those who cannot see it.
        svg: Inline SVG.
        paper: Whether it needs a white ground, since its colours are not the page's.
    """

    title: str
    caption: str
    svg: str
    paper: bool = False


def training(steps: list[Row], validations: list[Row], metric: str = "") -> list[Drawing]:
    """Loss, quality, gradient norm, learning rate, throughput and memory over the steps; those that have finite values.

    `metric` is the one that chose the checkpoint, and stands first.
    """
    with style():
        drawn = [
            _loss(steps, validations),
            *_validation_metrics(steps, validations, metric),
            _single(steps, "grad_norm", "Gradient norm", _norm_caption, logarithmic=True),
            _single(steps, "lr", "Learning rate", lambda values: f"Highest {max(values):.2g}, last {values[-1]:.2g}."),
            _throughput(steps),
            _memory(steps),
        ]
    return [figure for figure in drawn if figure]


def method(figures: list[Row]) -> list[Drawing]:
    """What a method shows of itself: ready SVG, `x` with one or several rows of `y`, or rows of numbers as `heat`.

    `x` may be names; they become bars. `labels` is `{"x", "y", "series"}`, each optional; rows of one name in "series"
    are thin lines of one colour. For `heat` its "y" names the rows, its "columns" the columns, which has each number
    written out, and its "value" says what the numbers are.
    """
    drawn = []
    with style():
        for index, figure in enumerate(figures):
            name = str(figure.get("title") or f"Figure {index + 1}")
            try:
                if isinstance(figure.get("svg"), str):
                    drawing = inline(figure["svg"], f"method-{index}", name)
                elif "heat" in figure:
                    drawing = _heat(figure, f"method-{index}", name)
                else:
                    drawing = _chart({**figure, **(figure.get("data") or {})}, f"method-{index}", name)
            except (ValueError, TypeError, KeyError) as error:
                drawn.append(Drawing(name, f"This figure could not be drawn: {error}", ""))
                continue
            drawn.append(Drawing(name, str(figure.get("caption") or ""), drawing, paper="svg" in figure))
    return drawn


def smooth(values: list[float], span: int) -> list[float]:
    """Mean of the `span` values around each, twice: without the lag of a running mean; the ends take what is there."""
    for _ in range(2):
        sums, reach, last = [0.0, *accumulate(values)], span // 2, len(values)
        bounds = [(max(0, i - reach), min(last, i + reach + 1)) for i in range(last)]
        values = [(sums[high] - sums[low]) / (high - low) for low, high in bounds]
    return values


def series(rows: list[Row], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows in which `key` is a finite number."""
    pairs = [(row["step"], row[key]) for row in rows if _finite(row.get(key))]
    return [step for step, _ in pairs], [value for _, value in pairs]


def thin(xs: list[int], ys: list[float], most: int = MOST_POINTS) -> tuple[list[int], list[float]]:
    """At most about `most` points, the lowest and the highest of each stretch, so that no spike gets lost."""
    if len(xs) <= most:
        return xs, ys
    width = math.ceil(2 * len(xs) / most)
    kept = []
    for start in range(0, len(xs), width):
        stretch = range(start, min(start + width, len(xs)))
        kept += sorted({min(stretch, key=ys.__getitem__), max(stretch, key=ys.__getitem__)})
    return [xs[i] for i in kept], [ys[i] for i in kept]


@contextmanager
def style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a reader's matplotlibrc must not change the bytes
        matplotlib.rcParams.update(STYLE)
        yield


def draw(paint: Callable[[Axes], None], slug: str, description: str, height: float = 2.7) -> str:
    from matplotlib.figure import Figure
    from matplotlib.ticker import AutoLocator, MaxNLocator

    figure = Figure(figsize=(5.0, height), layout="constrained")
    axes = figure.subplots()
    paint(axes)
    if isinstance(axes.yaxis.get_major_locator(), AutoLocator):
        # As many ticks as fit would depend on the height, and the room for their labels on the ticks: labels get cut.
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return inline(text.getvalue(), slug, description, VARIABLES)


def _over_steps(axes: Axes, rows: list[Row]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.margins(x=0.02)
    for step, name in _stage_starts(rows):
        axes.axvline(step, color=QUIET, linewidth=0.9, linestyle=(0, (1, 3)))
        axes.text(step, 1.02, name, transform=axes.get_xaxis_transform(), ha="center", fontsize=10, color=QUIET)


def _stage_starts(rows: list[Row]) -> list[tuple[int, str]]:
    """Where a new stage begins, the first one aside; nothing for a run of one stage."""
    return [
        (row["step"], str(row.get("stage")))
        for before, row in pairwise(rows)
        if row.get("stage") != before.get("stage")
    ]


def _loss(steps: list[Row], validations: list[Row]) -> Drawing | None:
    xs, ys = series(steps, "loss")
    vx, vy = series([{**row, **row["validation"]} for row in validations], "loss")
    if not xs:
        return None
    calm = smooth(ys, max(5, len(ys) // 15))
    start, end = units.number(calm[0]), units.number(calm[-1])
    caption = f"Smoothed, from {start} at step {xs[0]:,} to {end} at step {xs[-1]:,}."
    if vy:
        low = min(range(len(vy)), key=vy.__getitem__)
        caption += f" Lowest validation loss {units.number(vy[low])} at step {vx[low]:,}."
    if missing := len(steps) - len(xs):
        caption += f" {missing} step{'s' * (missing > 1)} without a finite loss."

    def paint(axes: Axes) -> None:
        axes.plot(*thin(xs, ys), color=FIRST, alpha=0.35, linewidth=0.8, label="each step")
        axes.plot(*thin(xs, calm), color=FIRST, label="smoothed")
        if vy:
            axes.plot(vx, vy, color=SECOND, marker="o", markersize=4.5, linewidth=1, label="validation")
        _over_steps(axes, steps)
        axes.legend(loc="upper right", ncols=1)

    return Drawing("Loss", caption, draw(paint, "loss", f"Training loss over steps. {caption}"))


def _validation_metrics(steps: list[Row], validations: list[Row], metric: str) -> Iterator[Drawing | None]:
    rows = [{**row, **row["validation"]} for row in validations]
    names = list(dict.fromkeys(name for row in validations for name in row["validation"] if name != "loss"))
    upward = [name for name in names if name in quality.SHARES - quality.LOWER_IS_BETTER]
    several = [name for name in upward if len(series(rows, name)[0]) > 1]
    shares = sorted(several, key=lambda name: name != metric)[: len(SERIES)]
    if not shares:
        return
    described = []
    for name in shares:
        xs, ys = series(rows, name)
        top = max(range(len(ys)), key=ys.__getitem__)
        described.append(f"Best {quality.title(name)} {units.percent(ys[top])} at step {xs[top]:,}.")

    def paint(axes: Axes) -> None:
        for name, color in zip(shares, SERIES, strict=False):
            xs, ys = series(rows, name)
            axes.plot(xs, [100 * y for y in ys], color=color, marker="o", markersize=4.5, label=quality.title(name))
        _over_steps(axes, steps or validations)
        if len(shares) > 1:
            axes.legend(loc="lower right")

    caption = " ".join(described)
    name = quality.title(shares[0]).capitalize() if len(shares) == 1 else "Quality"
    drawing = draw(paint, "validation", f"Quality on the validation rows over steps. {caption}")
    yield Drawing(f"{name} on the validation rows (%)", caption, drawing)


def _norm_caption(values: list[float]) -> str:
    middle = sorted(values)[len(values) // 2]
    scale = ", logarithmic scale" if _wide(values) else ""
    return (
        f"How strongly the loss pulls at the trained parameters. Median {units.number(middle)}, largest "
        f"{units.number(max(values))}; before clipping{scale}."
    )


def _wide(values: list[float]) -> bool:
    """Whether a logarithmic axis would have several ticks between the lowest and the highest value."""
    return 0 < 10 * min(values) <= max(values)


def _single(
    steps: list[Row], key: str, name: str, describe: Callable[[list[float]], str], logarithmic: bool = False
) -> Drawing | None:
    xs, ys = series(steps, key)
    if not xs:
        return None

    def paint(axes: Axes) -> None:
        axes.plot(*thin(xs, ys), color=FIRST, linewidth=1.2, clip_on=False)
        if logarithmic and _wide(ys):
            _logarithmic(axes, min(ys), max(ys))
        else:
            axes.set_ylim(bottom=0)
        _over_steps(axes, steps)

    caption = describe(ys)
    return Drawing(name, caption, draw(paint, key.replace("_", "-"), f"{name} over steps. {caption}"))


def _logarithmic(axes: Axes, low: float, high: float) -> None:
    """A logarithmic axis with plain numbers: 1, 2 and 5 of each power while they are few, powers alone beyond."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _throughput(steps: list[Row]) -> Drawing | None:
    counted = "tokens" if any(row.get("tokens") for row in steps) else "rows"
    rates = [
        {"step": row["step"], "rate": row[counted] / row["seconds"]}
        for row in steps
        if _finite(row.get(counted)) and _finite(row.get("seconds")) and row["seconds"] > 0
    ]
    middle = sorted(row["rate"] for row in rates)[len(rates) // 2] if rates else 0
    unit = f"thousand {counted}" if middle >= 10_000 else counted
    scale = 1000 if middle >= 10_000 else 1
    xs, ys = series([{**row, "rate": row["rate"] / scale} for row in rates], "rate")
    if not xs:
        return None

    def paint(axes: Axes) -> None:
        axes.plot(*thin(xs, ys), color=FIRST, alpha=0.35, linewidth=0.8)
        axes.plot(*thin(xs, smooth(ys, max(5, len(ys) // 15))), color=FIRST)
        axes.set_ylim(bottom=0)
        _over_steps(axes, steps)

    said = units.count if middle >= 10 else units.number
    caption = f"Median {said(middle)} {counted} a second; slowest {said(min(ys) * scale)}."
    title = f"{counted.capitalize()} a second. {caption}"
    return Drawing(f"Throughput ({unit}/s)", caption, draw(paint, "throughput", title))


def _memory(steps: list[Row]) -> Drawing | None:
    xs, ys = series(steps, "memory_bytes")
    if not xs:
        return None

    def paint(axes: Axes) -> None:
        axes.plot(*thin(xs, [y / 1e9 for y in ys]), color=FIRST)
        axes.set_ylim(0, 1.15 * max(ys) / 1e9)
        _over_steps(axes, steps)

    caption = f"Highest at a logged step {units.size(max(ys))}."
    return Drawing("Memory (GB)", caption, draw(paint, "memory", f"Memory of the process over steps. {caption}"))


def _chart(figure: Row, slug: str, name: str) -> str:
    x, y = list(figure["x"]), list(figure["y"])
    labels = figure.get("labels")
    labels = labels if isinstance(labels, dict) else {"series": labels or []}
    several = bool(y) and isinstance(y[0], list | tuple)
    rows = [[float(v) for v in row] for row in (y if several else [y])]
    if any(len(row) != len(x) for row in rows):
        raise ValueError(f"x has {len(x)} values, y has {', '.join(str(len(row)) for row in rows)}")
    named = [str(n) for n in labels.get("series") or []] + [""] * len(rows)
    bars = any(isinstance(value, str) for value in x)
    once = list(dict.fromkeys(named[: len(rows)])) if any(named) else named

    def paint(axes: Axes) -> None:
        for index, row in enumerate(rows):
            place = once.index(named[index]) if any(named) else index
            color = SERIES[place % len(SERIES)]
            if bars:
                thick = 0.8 / len(rows)
                places = [place + (index - (len(rows) - 1) / 2) * thick for place in range(len(x))]
                axes.barh(places, row, thick, color=color, label=named[index])
            else:
                many = bool(named[index]) and named.count(named[index]) > 1
                label = named[index] if named.index(named[index]) == index else ""
                axes.plot(x, row, color=color, label=label, alpha=0.45 if many else 1, linewidth=0.9 if many else 1.6)
        if bars:
            axes.set_yticks(range(len(x)), [_short(str(value)) for value in x])
            axes.invert_yaxis()
            axes.grid(visible=True, axis="x")
            axes.grid(visible=False, axis="y")
        axes.set_xlabel(str(labels.get("y" if bars else "x") or ""))
        axes.set_ylabel("" if bars else str(labels.get("y") or ""))
        if any(named):  # above the lines, which may be anywhere; in one row where there is room
            wide = sum(len(one) + 6 for one in once) > ROW_OF_LABELS
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=1 if wide else len(once), columnspacing=1.2)

    return draw(paint, slug, name, height=max(2.7, 0.24 * len(x) * bars))


def _heat(figure: Row, slug: str, name: str) -> str:
    """Cells as shapes in shades of one colour of the page: no picture stands in an SVG of ours, and dark is dark."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    rows, labels = [[float(v) for v in row] for row in figure["heat"]], figure.get("labels") or {}
    if len({len(row) for row in rows}) != 1:
        raise ValueError("the rows of a heat map must be of one length")
    named, shades = [str(label) for label in labels.get("y") or []], _shades(rows)
    columns = [str(label) for label in labels.get("columns") or []]

    def paint(axes: Axes) -> None:
        for value, (share, cells) in sorted(shades.items()):
            corners = ([(x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1), (x, y)] for x, y in cells)
            shape = Path.make_compound_path(*(Path(corner, closed=True) for corner in corners))
            shown = f"{value:.3g}" if len(shades) <= 6 or value in (min(shades), max(shades)) else ""
            strength = 0.6 * share if columns else share  # numbers are to be read on it
            axes.add_patch(PathPatch(shape, facecolor=FIRST, alpha=strength, linewidth=0, label=shown))
        axes.grid(visible=False)
        axes.set(xlim=(0, len(rows[0])), ylim=(len(rows), 0), xticks=[], xlabel=str(labels.get("x") or ""))
        every = math.ceil(len(rows) / 16)
        at = range(0, len(rows), every)
        axes.set_yticks([y + 0.5 for y in at], named[::every] if len(named) == len(rows) else [str(y) for y in at])
        if len(columns) == len(rows[0]):
            axes.set_xticks([x + 0.5 for x in range(len(columns))], columns)
            for y, row in enumerate(rows):
                for x, value in enumerate(row):
                    axes.text(x + 0.5, y + 0.5, f"{value:.2f}", ha="center", va="center", color=INK, fontsize=8)
        elif shades:
            axes.legend(title=labels.get("value"), ncols=6, loc="lower center", bbox_to_anchor=(0.5, 1), handlelength=1)

    return draw(paint, slug, name, height=max(2.7, 0.18 * min(len(rows), 40)))


def _shades(rows: list[list[float]], most: int = 8) -> dict[float, tuple[float, list[tuple[int, int]]]]:
    """Highest value of each shade, its strength and its cells (x, y): one a count up to `most`, else as many steps."""
    highest = max(map(max, rows))
    steps = int(highest) if highest <= most and all(v.is_integer() for row in rows for v in row) else most
    found: dict[float, tuple[float, list[tuple[int, int]]]] = {}
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            if value > 0:
                share = math.ceil(steps * value / highest) / steps
                found.setdefault(share * highest, (share, []))[1].append((x, y))
    return found


def _short(name: str, most: int = 28) -> str:
    """A long name by its end, in which modules of a model differ."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
