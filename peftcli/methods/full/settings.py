"""What a recipe may say about full fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class Settings:
    """Train every weight."""

    name: Literal["full"] = "full"
    """The method."""
    head_first: float = 0.0
    """Share of the steps that train the head alone before all is trained (LP-FT)."""
