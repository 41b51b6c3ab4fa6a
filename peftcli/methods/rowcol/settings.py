"""What a recipe may say about row and column spaces."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Distill:
    """What a model that was made from another one learns from it while it is trained."""

    weight: float = 0.5
    """Share of the loss that compares scores with the original's, KL(original || model); the task's loss has the rest.
    0 where the head is new."""
    temperature: float = 2.0
    """Scores are divided by it before they are compared, and the difference is multiplied by its square."""
    features: float = 1.0
    """Weight of the blocks' outputs, compared with the original's: |y - y'|² / |y'|², the mean over blocks."""
    layerwise_steps: int | float = 0
    """Steps before all others, or their share of all, in which each block learns by itself what the original's makes
    of the same inputs."""


@dataclass
class Settings:
    """Row and column spaces: an adapter inside them, a smaller model of them, or one matrix used through both."""

    name: Literal["rowcol"] = "rowcol"
    """The method."""
    mode: Literal["adapter", "compress", "tie"] = "adapter"
    """`adapter` trains a small core between two frozen bases, W + U R Vᵀ; `compress` rebuilds the model from the spaces
    that it uses, at a budget; `tie` makes one matrix do for two maps, W on the way in and Wᵀ on the way out. The last
    two train the model as a whole."""
    targets: list[str] = field(default_factory=list)
    """Roles (`attention.q`, `mlp`, `all`) or module names to adapt; with mode=compress those to rebuild, empty for all;
    with mode=tie the parts to tie, of `attention`, `mlp`, `conv` and, for ResNet, `stage`. Empty takes the family's
    usual ones."""
    target: dict[str, str | float] = field(default_factory=dict)
    """With mode=compress, what the backbone (the model without embeddings and head) may be of what it was, in one of
    `parameters`, `flops` and `latency` (measured on this machine): `{parameters: 50%}`, or 0.5."""
    prune: float = 0.0
    """With mode=compress, share of the single weights set to zero before, the smallest of the whole backbone."""
    basis: Literal["data", "weight", "gradient"] = "data"
    """Where the bases come from: what goes into a module and what it puts out on calibration rows, its weight alone, or
    the gradient of its weight on calibration rows."""
    rank: int | Literal["auto"] = 32
    """Directions of each module's two bases, or auto: by `energy` or by `budget`. A core has rank x rank numbers."""
    alpha: float | None = None
    """Scale of the change: alpha / rank; null is a scale of 1."""
    energy: float | None = None
    """With rank=auto: the fewest directions that hold this share of the energy on either side of a module."""
    budget: int | None = None
    """With rank=auto: trained numbers of all cores together, spent where they hold most by `worth`."""
    worth: Literal["energy", "sensitivity"] = "energy"
    """With `budget` or `target`, what a direction is worth: its share of its module's energy, or what it means for the
    loss on calibration rows: how fast that falls at first as a core learns (the squared gradient of its numbers), with
    mode=compress how much it rises where directions of the module go."""
    min_rank: int = 1
    """Fewest directions of a module with rank=auto."""
    max_rank: int = 64
    """Most directions of a module with rank=auto."""
    calibration_batches: int = 8
    """Training batches of `training.batch_size` rows that are looked at for bases and ranks; they go through the model
    as micro-batches."""
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the saved bases; cores are float32. With bfloat16 the bases are such numbers from the start."""
    layout: Literal["base", "halvit"] = "base"
    """With mode=tie: the base with its weights tied, or the ResNet of the paper (HaLViT), begun from random weights."""
    diagonal: bool = False
    """With mode=tie: a trained factor for each unit between the two uses of a matrix, which gives it its sign back."""
    distill: Distill = field(default_factory=Distill)
    """With mode=compress or tie, what is learnt from the original model; nothing with weight, features and
    layerwise_steps 0."""
