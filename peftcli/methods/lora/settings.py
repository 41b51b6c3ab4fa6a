"""What a recipe may say about LoRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Settings:
    """Low-rank adaptation: each targeted matrix gets a trained product of two thin ones."""

    name: Literal["lora"] = "lora"
    """The method."""
    r: int = 8
    """Rank of the update."""
    alpha: float = 16.0
    """Scale of the update: alpha / r, or alpha / sqrt(r) with `use_rslora`."""
    dropout: float = 0.0
    """Share of the update's inputs that is dropped while training."""
    targets: list[str] = field(default_factory=list)
    """Roles (`attention.q`, `mlp`, `all`) or module names to adapt; empty takes the family's usual ones."""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora", "mica"] = "default"
    """Start of the factors; pissa and olora take it out of the weight, and are saved as a LoRA of twice the rank."""
    use_dora: bool = False
    """Train the length of each output's weights apart from their direction (DoRA)."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r), which keeps the update's size when the rank grows (rsLoRA)."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Also train biases: all of them, or those of adapted modules."""
