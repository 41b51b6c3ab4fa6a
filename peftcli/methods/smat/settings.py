"""What a recipe may say about SMAT."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal


@dataclass
class Settings:
    """Sparse meta-tuning: for each few-shot task, sparse experts over one shared change of the weights are mixed."""

    name: Literal["smat"] = "smat"
    """The method."""
    targets: list[str] = field(default_factory=list)
    """What is changed: roles, groups of roles or module names; empty changes every weight of the model."""
    experts: int | Literal["auto"] = 8
    """Masks over the shared change; each task has its own mixture of them. auto tries `expert_choices`."""
    sparsity: float | Literal["auto"] = 0.9
    """Share of the weights that each expert leaves as they are, at least. auto tries `sparsity_choices`."""
    expert_choices: list[int] = field(default_factory=lambda: [4, 8, 16])
    """With experts=auto: short runs with each are measured on the validation tasks, and the best one is taken."""
    sparsity_choices: list[float] = field(default_factory=lambda: [0.5, 0.8, 0.9])
    """With sparsity=auto: as `expert_choices`."""
    structure: Literal["structured", "unstructured"] = "structured"
    """A mask has an entry for each input of a linear layer, output channel of a convolution and entry of a vector; or
    for each weight, which takes `experts` times the model's memory."""
    stochastic: bool = False
    """Draw masks at random while training (hard concrete with uniform noise) instead of taking them as they are."""
    inner_lr: float = 0.0
    """Rate of one step on the support before the query in training; 0 takes none, and the released code 1e-3."""
    teacher_steps: int = 1
    """Steps of the dense teacher on the query, from the task's weights; 0 has no teacher."""
    teacher_lr: float = 5e-3
    """Rate of the teacher's steps."""
    base_teacher: bool = False
    """Distil from the untouched base's prototypes too, which is in the released code and not in the figures."""
    distillation: float = 0.25
    """Weight of distillation in the loss; the query's cross-entropy has the rest."""
    divergence: Literal["reverse", "forward"] = "reverse"
    """KL(student || teacher), as the released code has it, or KL(teacher || student)."""
    temperature: float = 2.0
    """Temperature of distillation."""
    router_temperature: tuple[float, float] = (5.0, 1.875)
    """Temperature of the experts' weights at the first step and at the last, falling evenly."""
    router_lr: float = 1e-4
    """Rate of the router (AdamW)."""
    mask_lr: float | Literal["auto"] = "auto"
    """Rate of the mask entries (SGD), times their number; auto reaches `sparsity` in about a third of the run."""
    multiplier_lr: float | Literal["auto"] = "auto"
    """Rate of the Lagrange multipliers (SGD); auto goes by the length of the run."""
    settle: float = 0.1
    """Last share of the steps, in which masks are fixed, each at `sparsity` or above."""

    def candidates(self) -> list[Settings]:
        """What `auto` chooses among, the cheapest first; none where all is given."""
        if "auto" not in (self.experts, self.sparsity):
            return []
        experts = self.expert_choices if self.experts == "auto" else [self.experts]
        shares = self.sparsity_choices if self.sparsity == "auto" else [self.sparsity]
        return [replace(self, experts=m, sparsity=tau) for m in sorted(experts) for tau in sorted(shares, reverse=True)]

    def numbers(self) -> tuple[int, float]:
        """Experts and sparsity, where both are given."""
        assert self.experts != "auto"
        assert self.sparsity != "auto"
        return self.experts, self.sparsity
