"""What a recipe may say about SDT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Settings:
    """Sparse dimension tuning: a few channels and states of each state-space layer, and LoRA on its projections."""

    name: Literal["sdt"] = "sdt"
    """The method."""
    selector: Literal["taylor", "magnitude", "abar", "random"] = "taylor"
    """What ranks channels and states: gradients, what a warm-up changed (magnitude is the paper's), or chance."""
    channels: int | float | Literal["auto"] = 0.01
    """Channels trained in each layer: a count (1 is one), a share (1.0 is all), or auto (see score_share)."""
    states: int | float | Literal["auto"] = 0.25
    """States trained in each of those channels: a count (1 is one), a share (1.0 is all), or auto (see score_share)."""
    score_share: float = 0.5
    """With auto: the share of a layer's total score that the smallest set of channels, or of states, has to hold."""
    pruned: int | float = 0
    """Channels that are silenced for good, the least important ones: a count (1 is one) or a share (1.0 is all)."""
    warmup: int | float = 0.05
    """Steps before magnitude or abar selects: a count (paper: 500), or a share of all steps, at most an epoch."""
    calibration_batches: int = 8
    """Training batches of `training.batch_size` rows whose gradients rank channels, for taylor and pruned; at most 1/20
    of the steps. Sizes of gradients are added, each micro-batch's apart."""
    r: int = 8
    """Rank of LoRA."""
    alpha: float = 8.0
    """Scale of LoRA: alpha / r."""
    dropout: float = 0.0
    """Share of LoRA's inputs that is dropped while training."""
    lora_targets: list[Literal["ssm.in", "ssm.x", "ssm.dt", "ssm.out"]] = field(default_factory=lambda: ["ssm.out"])
    """Projections that LoRA adapts; an empty list trains the state-space parameters alone."""
