"""What a rule of the configuration is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """Values that do not go together.

    Attributes:
        reads: Dotted keys; the first that was written down is where the message points.
        broken: Called with the values of `reads`; true where they conflict.
        what: The message.
        hint: What to change.
    """

    reads: tuple[str, ...]
    broken: Callable[..., bool]
    what: str
    hint: str = ""
