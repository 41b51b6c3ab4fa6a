"""One line of the test matrix: a method with settings on a tiny base."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch

from peftcli.config import catalog
from peftcli.methods import registry
from peftcli.methods.contract import Calibration, Method
from peftcli.testing import tiny
from peftcli.testing.tiny import Base

STEPS = 3


@dataclass(frozen=True)
class Row:
    """A method with settings on a tiny base.

    Attributes:
        method: The method's name.
        settings: Fields of its settings class.
        label: Tells this row from the method's others.
        base: Builds the base from a dtype and an architecture; the same weights at every call.
        architecture: `causal-lm`, `sequence-classification` or `image-classification`.
        exact_gradients: False where the method's own formula stops a gradient on purpose (DoRA's norm).
        dtype: The type the exact tests run in; float32 where the method refuses float64.
        recomputes: False where the base itself cannot be computed again in the backward pass.
    """

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    base: Callable[..., Base] = tiny.llama
    architecture: str = "causal-lm"
    exact_gradients: bool = True
    dtype: torch.dtype = torch.float64
    recomputes: bool = True

    def __str__(self) -> str:
        return "-".join(part for part in (self.method, self.label) if part)

    def new_method(self) -> Method:
        """The method, fresh."""
        return registry.find(self.method)(catalog.settings_class(self.method)(**self.settings))

    def new_base(self, dtype: torch.dtype | None = None) -> Base:
        """The untouched base, in the row's own type or another."""
        return self.base(dtype or self.dtype, self.architecture)

    def attached(self, dtype: torch.dtype | None = None) -> tuple[Base, Any, Method]:
        """The base as it was built, the model with the adapter in it, in evaluation mode, and the method."""
        untouched, base, method = self.new_base(dtype), self.new_base(dtype), self.new_method()
        torch.manual_seed(0)
        calibration = Calibration([[base.batch]], lambda model, _: base.loss(model), 1, STEPS)
        model: Any = method.attach(base.model, base.family, calibration)
        for stage in method.stages(STEPS)[-1:]:
            if stage.start:
                stage.start(model)
        return untouched, model.eval(), method


def trained(model: Any) -> dict[str, Any]:
    """The trained tensors by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def nudge(model: Any, seed: int = 1, size: float = 0.05, but: Collection[str] = ()) -> None:
    """Move every trained tensor to a point where none is zero: zero factors hide gradients and differences."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in trained(model).items():
        if name not in but:
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=size)


def train(model: Any, method: Method, base: Base, steps: int = STEPS) -> None:
    """A few steps of AdamW through the method's life, in training mode; ends in evaluation mode."""
    optimiser = torch.optim.AdamW(trained(model).values(), lr=1e-2, weight_decay=0.0)
    method.take_optimiser(model, optimiser)
    model.train()
    for step in range(1, steps + 1):
        loss = base.loss(model)
        extra = method.penalty(model)
        (loss if extra is None else loss + extra).backward()
        optimiser.step()
        method.after_step(model, step)
        optimiser.zero_grad()
    model.eval()
