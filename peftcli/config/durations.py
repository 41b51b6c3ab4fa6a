"""Time limits as people write them and as Slurm does."""

from __future__ import annotations

import re

UNITS = {"d": 24 * 60, "h": 60, "m": 1}


def minutes(text: str) -> int | None:
    """Minutes of `90m`, `2h`, `1d12h`, or of Slurm's `minutes`, `hours:minutes:seconds`, `days-hours[:minutes...]`.

    Returns:
        Whole minutes, rounded up; None where it is none of these, or no time at all.
    """
    words = text.strip().lower()
    if re.fullmatch(r"(\d+[dhm])+", words):
        return sum(int(number) * UNITS[unit] for number, unit in re.findall(r"(\d+)([dhm])", words)) or None
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", words)
    if not found:
        return None
    days, *parts = (int(part or 0) for part in found.groups())
    # After days, or where there are three parts, the first are hours; else minutes.
    hours, mins, seconds = parts if found[1] or found[4] else (0, *parts[:2])
    return days * UNITS["d"] + hours * 60 + mins + (seconds > 0) or None


def slurm(text: str) -> str:
    """The same as `days-hours:minutes:seconds`."""
    whole = minutes(text)
    assert whole
    days, rest = divmod(whole, UNITS["d"])
    return f"{days}-{rest // 60:02}:{rest % 60:02}:00"
