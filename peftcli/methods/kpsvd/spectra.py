"""What the report shows: every module's spectrum, where it was cut and by what; in words and as one drawing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from peftcli.methods.kpsvd.start import Start

WIDE, HIGH, COLUMNS, HEAD = 172, 74, 4, 13
COLORS = {
    "energy": "#2a6fb0", "elbow": "#b0472a", "budget": "#3a7d44", "calibration": "#7a4fa3", "rank": "#444444",
    "min_rank": "#8a6d00", "max_rank": "#8a6d00",
}  # fmt: skip


def summary(starts: Mapping[str, Start]) -> str:
    """One sentence: how many terms, spread over the modules how, decided by what."""
    counts = [found.cut.terms for found in starts.values()]
    by = Counter(found.cut.bound for found in starts.values())
    reasons = ", ".join(f"{bound} in {number}" for bound, number in by.most_common())
    return f"{sum(counts)} terms over {len(counts)} modules, {min(counts)} to {max(counts)} each; bound by {reasons}"


def figures(starts: Mapping[str, Start], notes: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A small chart for each module: its leading singular values, the kept ones apart from the others.

    Args:
        starts: By module name; without any there is nothing to show.
        notes: How automatic ranks came about.
    """
    if not starts:
        return []
    said = " ".join(f"{note}." for note in notes) or f"{summary(starts)}."
    caption = (
        "Singular values of each module's Kronecker terms, as shares of the first; the kept terms are filled, and the "
        f"colour says what decided their number. {said}"
    )
    return [{"title": "Kronecker spectra", "svg": _grid(starts), "caption": caption}]


def _grid(starts: Mapping[str, Start]) -> str:
    lines = -(-len(starts) // COLUMNS)
    height = lines * (HIGH + 24) + 20
    cells = "".join(
        f'<g transform="translate({(place % COLUMNS) * (WIDE + 8)} {(place // COLUMNS) * (HIGH + 24)})">'
        f"{_cell(name, found)}</g>"
        for place, (name, found) in enumerate(starts.items())
    )
    bounds = list(dict.fromkeys(found.cut.bound for found in starts.values()))
    legend = "".join(
        f'<text x="{4 + 130 * place}" y="{height - 6}" font-size="11" fill="{COLORS[bound]}">{bound}</text>'
        for place, bound in enumerate(bounds)
    )
    size = f'viewBox="0 0 {COLUMNS * (WIDE + 8)} {height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{cells}{legend}</svg>'


def _cell(name: str, found: Start) -> str:
    """A module's name, its singular values as bars, and its number of terms."""
    sigma = found.terms.sigma.tolist()
    color, step = COLORS[found.cut.bound], WIDE / len(sigma)
    bars = "".join(
        f'<rect x="{k * step:.1f}" y="{HEAD + HIGH * (1 - value / sigma[0]):.1f}" width="{0.8 * step:.1f}" '
        f'height="{HIGH * value / sigma[0]:.1f}" fill="{color if k in found.kept else "#dddddd"}"/>'
        for k, value in enumerate(sigma)
    )
    label = escape(_short(name))
    return (
        f'<text x="0" y="9" font-size="9" fill="#222222">{label}</text>{bars}'
        f'<text x="{WIDE}" y="9" font-size="9" text-anchor="end" fill="{color}">{found.cut.terms}</text>'
    )


def _short(name: str, most: int = 30) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"
