"""SMAT's configuration, as it stands in a saved adapter and as a script of plain PEFT gives it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from peftcli.methods.peft_types import PeftName

NAME = "SMAT"


@dataclass
class SmatConfig(PeftConfig):
    """Sparse mixture-of-experts meta-tuning.

    Attributes:
        experts: M.
        sparsity: Least share of zeros of each expert's mask.
        structured: Whether masks have an entry for each column or channel, or for each weight.
        stochastic: Whether masks are drawn at random while training.
        inner_lr: Of the step on the support in training.
        teacher_steps: Of the dense teacher; 0 has none.
        teacher_lr: Of its steps.
        base_teacher: Whether the untouched base teaches too.
        distillation: Weight of distillation in the loss.
        reverse: KL(student || teacher), else KL(teacher || student).
        temperature: Of distillation.
        router_temperature: Of the experts' weights, as it is now.
        weights: Names of the changed weights of the base; None changes all of them.
    """

    experts: int = 8
    sparsity: float = 0.9
    structured: bool = True
    stochastic: bool = False
    inner_lr: float = 0.0
    teacher_steps: int = 1
    teacher_lr: float = 5e-3
    base_teacher: bool = False
    distillation: float = 0.25
    reverse: bool = True
    temperature: float = 2.0
    router_temperature: float = 1.875
    weights: list[str] | None = field(default=None)
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type: Any = PeftName(NAME)
