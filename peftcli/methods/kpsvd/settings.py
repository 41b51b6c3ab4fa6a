"""What a recipe may say about KPSVD."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Settings:
    """Kronecker-product SVD: train the leading terms of each matrix, written as a sum of Kronecker products."""

    name: Literal["kpsvd"] = "kpsvd"
    """The method."""
    source: Literal["weight", "gradient", "delta"] = "weight"
    """What is decomposed into the terms that training starts with: the weight, the gradient on calibration rows, or
    what a full fine-tuning changed (`tuned`). The start is the base's function with any."""
    tuned: str | None = None
    """With source=delta: folder of the fine-tuned model's safetensors, such as `model` in a run of method=full."""
    rank: int | Literal["auto"] = 2
    """Terms of each module, or auto: as many as `energy`, `elbow`, `budget` or a calibration set find worth it."""
    alpha: float | None = None
    """Scale of the terms: alpha / terms; null is a scale of 1. The start is the base's function at any scale."""
    targets: list[str] = field(default_factory=list)
    """Roles (`attention.q`, `mlp`, `all`) or module names to adapt; empty takes the family's usual ones."""
    factors: Literal["square", "thin"] = "square"
    """Shapes of a term's two factors: near-square with the fewest parameters, or a column and a row (as PiSSA)."""
    splits: dict[str, list[int]] = field(default_factory=dict)
    """Factor shapes by shape of the weight, before `factors`: `{4096x4096: [64, 64, 64, 64]}` is m, n, p, q of an
    m x n and a p x q factor."""
    sigma: Literal["absorbed", "trained"] = "absorbed"
    """Put the root of each singular value into both factors, or train it as a number of its own."""
    base: Literal["residual", "delta"] = "residual"
    """While training, take the first terms out of the weight (fastest), or leave it as it is and subtract them. Saved
    adapters fit the untouched base either way."""
    energy: float | None = None
    """With rank=auto: keep the fewest terms with this share of the energy."""
    energy_of: Literal["weight", "candidates"] = "weight"
    """The energy that `energy` is a share of: the whole weight's, or that of its `max_rank` leading terms."""
    elbow: Literal["chord", "curvature", "none"] = "chord"
    """With `energy`, stop before the bend of the spectrum: the point furthest below its chord, or of largest second
    difference."""
    budget: int | None = None
    """With rank=auto: trained parameters of all modules together, spent where a parameter holds most energy."""
    min_rank: int = 1
    """Fewest terms of a module with rank=auto."""
    max_rank: int = 32
    """Most terms of a module with rank=auto, and how many are looked at."""
    loss_increase: float = 0.2
    """With rank=auto and neither `energy` nor `budget`: how much higher the loss is predicted to be than with all
    candidates trained, as a share of the decrease that is predicted with these."""
    calibration_batches: int = 8
    """Training batches of `training.batch_size` rows whose gradient makes this prediction, or is the source; they go
    through the model as micro-batches."""
    iterations: int = 12
    """Steps of the block Krylov method that finds the terms; more come closer to the exact ones."""
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the saved numbers; bfloat16 halves the file and keeps eight bits of each factor's change."""
