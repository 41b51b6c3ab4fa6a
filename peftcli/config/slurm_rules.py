"""What sbatch would take for something else, or refuse only when the script is there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from peftcli.config import durations
from peftcli.config.errors import Mistake

NAMES = ("partition", "account", "qos", "constraint", "gpu_type")


def mistakes(get: Callable[[str], Any], of: Callable[..., str]) -> Iterator[Mistake]:
    """Those of the launch group.

    Args:
        get: The value of a dotted key.
        of: Where it was written.
    """
    time, warning = get("launch.time"), get("launch.warning")
    if isinstance(time, str):
        minutes = durations.minutes(time)
        if not minutes:
            yield Mistake(f"launch.time is {time!r}", of("launch.time"), ("90m", "2h", "1d12h", "1-12:00:00"))
        elif isinstance(warning, int) and warning >= 60 * minutes:
            what = f"launch.time={time} ends before launch.warning={warning} seconds are left"
            yield Mistake(
                what, of("launch.time", "launch.warning"), hint="give it more time, or launch.warning=SECONDS"
            )
    memory = get("launch.mem")
    if isinstance(memory, str) and not re.fullmatch(r"\d+[KMGT]?", memory):
        yield Mistake(f"launch.mem is {memory!r}", of("launch.mem"), ("64G", "500M", "0 for all of a node"))
    for name in NAMES:
        value = get(f"launch.{name}")
        if isinstance(value, str) and re.search(r"[\s\"']|^$", value):
            yield Mistake(f"launch.{name} is {value!r}, expected a name without spaces", of(f"launch.{name}"))
    options = get("launch.options")
    for option in options if isinstance(options, list) else ():
        if isinstance(option, str) and not re.fullmatch(r"-[^\n]+", option):
            what = f"launch.options has {option!r}, expected an option of sbatch"
            yield Mistake(what, of("launch.options"), ("--exclusive",))
