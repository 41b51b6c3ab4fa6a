"""What a recipe may say about sparse adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Settings:
    """Sparse adapters: small gated modules in a frozen model, pruned to a budget while they are trained."""

    name: Literal["sparse_adapter"] = "sparse_adapter"
    """The method."""
    r: int = 64
    """Units of each module's bottleneck, before any is pruned."""
    targets: list[str] = field(default_factory=list)
    """Where modules go: `attention`, `mlp`, `ssm`, `block`, a role or a module name; empty takes the family's usual
    places (attention and mlp; ssm; block for a ResNet)."""
    placement: Literal["sequential", "parallel"] = "sequential"
    """The module reads what the place puts out, or what goes into the place."""
    last_blocks: int | float = 1.0
    """Blocks that get modules, counted from the last one: a count, or a share (1.0 is all). Blocks before them keep
    nothing for the backward pass."""
    chosen: int | float | None = None
    """Modules that stay after the second stage, by their score: a count or a share; null keeps all. All of them are
    trained in the second stage then."""
    activation: Literal["gelu", "relu", "linear"] = "gelu"
    """Between the two matrices of a module. A linear module has no biases, and can be merged into its layer."""
    gate: bool = True
    """Train a factor for each unit."""
    norm: bool = False
    """Normalise what a module reads (LayerNorm over its channels)."""
    dropout: float = 0.1
    """Share of a module's units that is dropped in a training step, drawn for each row."""
    structure: Literal["unit", "weight"] = "unit"
    """What is pruned: whole units, so that the modules become smaller, or single weights, which saves storage only."""
    sparsity: float | Literal["auto"] = "auto"
    """Share of units or weights that are zero in the end; auto is 0.5 of the units, 0.8 of the weights, or 1 - 1/wide.
    0 prunes nothing."""
    wide: int = 1
    """Large-Sparse: so many times the units, of which 1/wide is kept."""
    floor: int = 0
    """Units (or weights) that each module keeps at least; with 0 a module may vanish."""
    importance: Literal["first_order", "magnitude", "fisher"] = "first_order"
    """What ranks them: running means of |weight x gradient| or of the squared gradient, or |weight| as a
    share of its matrix's mean."""
    l1: float = 1e-5
    """Strength of the L1 penalty in the third stage, applied by proximal steps."""
    group: float = 1e-3
    """Strength of the group penalty on whole units in the third stage, applied by proximal steps."""
    probe: float = 0.1
    """First stage, as a share of all steps: the head alone. None where the model has no new head."""
    few: float = 0.2
    """Second stage: the head and the modules of the last blocks, without any penalty."""
    few_blocks: int | float = 0.5
    """Blocks whose modules the second stage trains, counted from the last of those that have any."""
    final: float = 0.2
    """Fourth stage: what survived, without a penalty, at a third of the rate. The third stage, which prunes, has the
    steps that are left."""
    guard: float | None = 0.05
    """Largest loss of the validation metric that pruning may cost, or half the 95 % interval of a share of the split's
    rows where that is more; beyond it, sparsity goes back to where it was at the last measurement that was good enough.
    Null prunes whatever it costs."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the saved numbers."""
