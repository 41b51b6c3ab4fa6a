"""What a recipe may say about a tuner of PEFT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from peftcli.config.schema import REQUIRED


@dataclass
class Settings:
    """Any tuner of Hugging Face PEFT, by its own name and arguments."""

    name: Literal["peft"] = "peft"
    """The method."""
    type: str = REQUIRED
    """PEFT's name of the tuner: LORA, LOKR, IA3, SHIRA, VERA, ADALORA, PREFIX_TUNING, ..."""
    targets: list[str] = field(default_factory=list)
    """Roles (`attention.q`, `mlp`, `all`) or module names; empty takes the tuner's own choice, or all linear layers."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of PEFT's configuration of that tuner, by PEFT's names."""
