"""Numbers as people write them: counts with commas, decimal bytes, minutes and seconds, percent."""

from __future__ import annotations

import math

NONE = "–"


def count(value: float | None) -> str:
    """A whole number with commas."""
    return NONE if value is None else f"{round(value):,}"


def size(value: float | None) -> str:
    """Bytes in decimal units, three digits: 1,843,200 is 1.84 MB."""
    if value is None:
        return NONE
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.0f} bytes" if unit == "bytes" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} TB" if value < 999.5 else f"{value:,.0f} TB"


def duration(seconds: float | None) -> str:
    """Seconds as the two units that matter: 0.61 s, 5.3 s, 1 min 48 s, 3 h 12 min."""
    if seconds is None or not math.isfinite(seconds):
        return NONE
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60} min"


def percent(share: float | None, digits: int = 1) -> str:
    """A share of one as percent, with more digits where it would otherwise read as zero."""
    if share is None or not math.isfinite(share):
        return NONE
    if 0 < abs(share) < 0.5 * 10 ** -(digits + 2):
        return f"{100 * share:.2g} %"
    return f"{100 * share:.{digits}f} %"


def number(value: float | None) -> str:
    """A measured number: four digits, and a power of ten only where they would not do."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"
    return f"{value:.2e}"
