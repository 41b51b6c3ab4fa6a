"""What a recipe may say about the base as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class Settings:
    """Train nothing, and measure the base as it is: for few-shot tasks, pre-trained prototypes."""

    name: Literal["frozen"] = "frozen"
    """The method."""
