"""What a recipe may say about the linear probe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class Settings:
    """Train the classification head alone, on features that stay as they are."""

    name: Literal["linear_probe"] = "linear_probe"
    """The method."""
