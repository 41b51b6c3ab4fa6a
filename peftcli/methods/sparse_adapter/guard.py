"""Pruning that costs too much is taken back: the state at the last good measurement, and where the metric stood."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from peftcli.methods.sparse_adapter import compaction
from peftcli.methods.sparse_adapter.layer import LIVE

Z_95 = 1.96


class Guard:
    """Keeps a copy of what is trained from the last measurement that lost no more than it may.

    Args:
        allowed: Largest loss of the metric; None allows any.
        adapter: The adapter's name.

    Attributes:
        reference: The metric before pruning, negated where less is better.
        level: Sparsity at the last good measurement.
        held: Whether pruning was taken back, and ended there.
    """

    def __init__(self, allowed: float | None, adapter: str):
        self.allowed, self.adapter = allowed, adapter
        self.reference: float | None = None
        self.level, self.held = 0.0, False
        self._copy: dict[str, Tensor] = {}

    def remember(self, model: Any, sparsity: float) -> None:
        """This is good enough."""
        if self.allowed is not None:
            self.level = sparsity
            self._copy = {f"trained/{n}": p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
            self._copy |= {key: mask.clone() for key, mask in live(model, self.adapter).items()}

    def loses(self, value: float, rows: int = 0) -> float | None:
        """By how much a measurement on so many rows is worse than before pruning, where that is too much."""
        if self.allowed is None or self.reference is None or self.held:
            return None
        loss = self.reference - value
        return loss if loss > max(self.allowed, chance(self.reference, rows)) else None

    @torch.no_grad()
    def step_back(self, model: Any) -> None:
        """Give everything that is trained its values of the last good measurement; nothing is pruned after that."""
        self.held = True
        parameters = dict(model.named_parameters())
        for key, tensor in self._copy.items():
            if key.startswith("trained/"):
                parameters[key.removeprefix("trained/")].copy_(tensor)
        put_live(model, self.adapter, self._copy)
        self._copy = {}

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        reference = float("nan") if self.reference is None else self.reference
        numbers = torch.tensor([reference, self.level, float(self.held)], dtype=torch.float64)
        return {"guard": numbers, **{f"guard/{key}": tensor for key, tensor in self._copy.items()}}

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Take back what `state` gave."""
        reference, self.level, held = state["guard"].tolist()
        self.reference, self.held = None if reference != reference else reference, bool(held)
        kept = {key.removeprefix("guard/"): t for key, t in state.items() if key.startswith("guard/")}
        self._copy = {key: tensor.to(device, copy=True) for key, tensor in kept.items()}


def chance(share: float, rows: int) -> float:
    """How far off a share of rows may be, half its 95 % interval (Agresti and Coull, 1998); 0 of what is no share.

    AUROC counts as one. Two measurements on the same rows differ by less, so what exceeds this is no accident.
    """
    if not rows or not 0 <= share <= 1:
        return 0.0
    drawn = rows + Z_95**2
    centre = (share * rows + Z_95**2 / 2) / drawn
    return Z_95 * math.sqrt(centre * (1 - centre) / drawn)


def live(model: Any, adapter: str) -> dict[str, Tensor]:
    """Every module's masks, as `live/<kind>/<module>`; none before the first pruning."""
    return {
        f"live/{kind}/{name}": mask
        for name, layer in compaction.layers(model, adapter)
        for kind in LIVE
        if (mask := layer.live(kind, adapter)) is not None
    }


def put_live(model: Any, adapter: str, masks: dict[str, Tensor]) -> None:
    """Give every module the masks that `live` gave, and no others."""
    for name, layer in compaction.layers(model, adapter):
        layer.revive(adapter)
        found = {kind: masks[key] for kind in LIVE if (key := f"live/{kind}/{name}") in masks}
        if found:
            layer.prune(adapter, found)
