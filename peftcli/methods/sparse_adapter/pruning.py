"""What happens around an optimiser's step while modules are pruned: scores before it, proximal step and masks after it.

Gradients and weights are seen together before the step, when scores are defined; the proximal step follows with the
step's own rate and Adam's second moments. Hooks of the optimiser itself, so that a step that it skips counts nowhere.

Letters: as in `layer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftcli.methods.sparse_adapter import compaction, maths
from peftcli.methods.sparse_adapter.layer import SparseAdapterLayer

SCORED = ("down", "up", "gate")
"""What is penalised and ranked; biases are neither, and go with their units."""


class Pruning:
    """The scores of an adapter's weights, and what follows from them.

    Args:
        structure: `unit` or `weight`.
        importance: As `Settings.importance`.
        adapter: The adapter's name.

    Attributes:
        scores: Running means by `<module>/<kind>`.
        modules: Running means of sum |weight x gradient|, by module.
    """

    def __init__(self, structure: str, importance: str, adapter: str):
        self.structure, self.importance, self.adapter = structure, importance, adapter
        self.scores: dict[str, Tensor] = {}
        self.modules: dict[str, Tensor] = {}

    @torch.no_grad()
    def watch(self, model: Any) -> None:
        """Take the gradients of a step into the scores of weights."""
        if self.importance == "magnitude":
            return
        for name, layer in compaction.layers(model, self.adapter):
            for kind, weight in layer.tensors(self.adapter).items():
                if kind in SCORED and weight.grad is not None:
                    new = maths.score(self.importance, weight, weight.grad)
                    _mix(self.scores, f"{name}/{kind}", new)

    @torch.no_grad()
    def watch_modules(self, model: Any) -> None:
        """Take the gradients of a step into the scores of whole modules."""
        for name, layer in compaction.layers(model, self.adapter):
            weights = [w for kind, w in layer.tensors(self.adapter).items() if kind in SCORED and w.grad is not None]
            if weights:
                new = torch.stack([maths.score("first_order", w, w.grad).sum() for w in weights if w.grad is not None])
                _mix(self.modules, name, new.sum())

    @torch.no_grad()
    def proximal(self, model: Any, optimiser: torch.optim.Optimizer, l1: float, group: float) -> None:
        """The step of the penalty: L1 in Adam's metric where there is Adam, then whole units in the plain one."""
        settings = {p: row for row in optimiser.param_groups for p in row["params"]}
        for _, layer in compaction.layers(model, self.adapter):
            tensors = layer.tensors(self.adapter)
            for kind in SCORED if l1 else ():
                if (weight := tensors.get(kind)) is not None and weight in settings:
                    weight.copy_(maths.soft(weight, _threshold(weight, settings[weight], optimiser.state, l1)))
            if group and (row := settings.get(tensors["down"])):
                gate_R = tensors.get("gate")
                factor_R = maths.unit_factors(tensors["down"], tensors["up"], gate_R, row["lr"] * group)
                tensors["down"].mul_(factor_R[:, None])
                tensors["up"].mul_(factor_R)
                if gate_R is not None:
                    gate_R.mul_(factor_R)

    @torch.no_grad()
    def prune(self, model: Any, sparsity: float, floor: int, optimiser: torch.optim.Optimizer | None = None) -> None:
        """Leave the share 1 - sparsity of all units or weights, those with the highest scores, and no other."""
        found = list(compaction.layers(model, self.adapter))
        ranks = [self._ranks(name, layer) for name, layer in found]
        if not any(bool(score_K.any()) for score_K, _ in ranks):  # nothing learnt yet: every score is zero
            ranks = [self._ranks(name, layer, "magnitude") for name, layer in found]
        scores, live = zip(*ranks, strict=True)
        count = maths.kept(sparsity, sum(map(len, scores)))
        for (_, layer), left_K in zip(found, maths.keep(scores, live, count, floor), strict=True):
            layer.prune(self.adapter, self._shaped(layer, left_K))
            if optimiser is not None:
                self.forget(layer, optimiser)

    def _ranks(self, name: str, layer: SparseAdapterLayer, importance: str = "") -> tuple[Tensor, Tensor]:
        """Scores of a module's units or weights, and which of them are live, flat."""
        tensors = {kind: t for kind, t in layer.tensors(self.adapter).items() if kind in SCORED}
        magnitude = (importance or self.importance) == "magnitude"
        scores = {
            kind: maths.magnitude(tensor) if magnitude else self.scores.get(f"{name}/{kind}", torch.zeros_like(tensor))
            for kind, tensor in tensors.items()
        }
        if self.structure == "unit":
            score_R = maths.unit_scores(scores["down"], scores["up"], scores.get("gate"))
            live_R = layer.live("units", self.adapter)
            return score_R, torch.ones_like(score_R, dtype=torch.bool) if live_R is None else live_R
        score_K = torch.cat([scores["down"].flatten(), scores["up"].flatten()])
        down_RI, up_ER = (layer.live(kind, self.adapter) for kind in ("down", "up"))
        if down_RI is None or up_ER is None:
            return score_K, torch.ones_like(score_K, dtype=torch.bool)
        return score_K, torch.cat([down_RI.flatten(), up_ER.flatten()])

    def _shaped(self, layer: SparseAdapterLayer, left_K: Tensor) -> dict[str, Tensor]:
        if self.structure == "unit":
            return {"units": left_K}
        D_RI, U_ER = layer.sparse_down[self.adapter], layer.sparse_up[self.adapter]
        down_K, up_K = left_K.split([D_RI.numel(), U_ER.numel()])
        return {"down": down_K.view_as(D_RI), "up": up_K.view_as(U_ER)}

    @torch.no_grad()
    def forget(self, layer: SparseAdapterLayer, optimiser: torch.optim.Optimizer) -> None:
        """Clear what the optimiser remembers of pruned weights, which would move them once more."""
        tensors = layer.tensors(self.adapter)
        for kind, mask in layer.masks(self.adapter).items():
            tensor = tensors.get(kind)
            if tensor is None or tensor not in optimiser.state:
                continue
            for moment in optimiser.state[tensor].values():
                if moment.shape == tensor.shape:  # its count of steps is no moment
                    moment.masked_fill_(~mask, 0)


def _mix(means: dict[str, Tensor], key: str, new: Tensor) -> None:
    old = means.get(key, torch.zeros_like(new))
    means[key] = old.lerp(new, 1 - maths.DECAY)


def _threshold(weight: Tensor, row: Mapping[str, Any], state: Mapping[Tensor, Any], l1: float) -> Tensor | float:
    memory = state.get(weight, {})
    if "exp_avg_sq" not in memory:
        return row["lr"] * l1
    squares, step = memory["exp_avg_sq"], float(memory["step"])
    return maths.adam_threshold(row["lr"], l1, squares, step, row["betas"][1], row["eps"])
