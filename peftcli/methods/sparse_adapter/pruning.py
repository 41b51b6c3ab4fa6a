"""What happens around an optimiser's step while modules are pruned: scores before it, proximal step and masks after it.

Gradients and weights are seen together before the step, when scores are defined; the proximal step follows with the
step's own rate and Adam's second moments. Hooks of the optimiser itself, so that a step that it skips counts nowhere.

Letters: as in `layer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftcli.methods.sparse_adapter import compaction, maths
from peftcli.methods.sparse_adapter.layer import SparseAdapterLayer

SCORED = ("down", "up", "gate")
"""What is penalised and ranked; biases are neither, and go with their units."""


class Part(NamedTuple):
    """A module, looked up once: a stage has the same ones from its first step to its last."""

    name: str
    layer: SparseAdapterLayer
    tensors: dict[str, nn.Parameter]


def parts(model: Any, adapter: str) -> list[Part]:
    """All modules of an adapter."""
    return [Part(name, layer, layer.tensors(adapter)) for name, layer in compaction.layers(model, adapter)]


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
    def watch(self, found: Sequence[Part]) -> None:
        """Take the gradients of a step into the scores of weights."""
        if self.importance == "magnitude":
            return
        for part in found:
            for kind in SCORED:
                if (weight := part.tensors.get(kind)) is not None and weight.grad is not None:
                    new = maths.score(self.importance, weight, weight.grad)
                    _mix(self.scores, f"{part.name}/{kind}", new)

    @torch.no_grad()
    def watch_modules(self, found: Sequence[Part]) -> None:
        """Take the gradients of a step into the scores of whole modules."""
        for part in found:
            weights = [w for kind, w in part.tensors.items() if kind in SCORED and w.grad is not None]
            if weights:
                new = torch.stack([maths.score("first_order", w, w.grad).sum() for w in weights if w.grad is not None])
                _mix(self.modules, part.name, new.sum())

    @torch.no_grad()
    def proximal(self, found: Sequence[Part], optimiser: torch.optim.Optimizer, l1: float, group: float) -> None:
        """The step of the penalty: L1 in Adam's metric where there is Adam, then whole units in the plain one."""
        settings = {p: row for row in optimiser.param_groups for p in row["params"]}
        for _, _, tensors in found:
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
    def prune(
        self, found: Sequence[Part], sparsity: float, floor: int, optimiser: torch.optim.Optimizer | None = None
    ) -> None:
        """Leave the share 1 - sparsity of all units or weights, those with the highest scores, and no other."""
        ranks = [self._ranks(part) for part in found]
        if not any(bool(score_K.any()) for score_K, _ in ranks):  # nothing learnt yet: every score is zero
            ranks = [self._ranks(part, "magnitude") for part in found]
        scores, live = zip(*ranks, strict=True)
        count = maths.kept(sparsity, sum(map(len, scores)))
        for part, live_K, left_K in zip(found, live, maths.keep(scores, live, count, floor), strict=True):
            if torch.equal(left_K, live_K):
                continue
            part.layer.prune(self.adapter, self._shaped(part, left_K))
            if optimiser is not None:
                self.forget(part, optimiser)

    def _ranks(self, part: Part, importance: str = "") -> tuple[Tensor, Tensor]:
        """Scores of a module's units or weights, and which of them are live, flat."""
        layer, tensors = part.layer, {kind: t for kind, t in part.tensors.items() if kind in SCORED}
        magnitude = (importance or self.importance) == "magnitude"
        scores = {
            kind: maths.magnitude(tensor) if magnitude else self._score(f"{part.name}/{kind}", tensor)
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

    def _score(self, key: str, tensor: Tensor) -> Tensor:
        return self.scores[key] if key in self.scores else torch.zeros_like(tensor)

    def _shaped(self, part: Part, left_K: Tensor) -> dict[str, Tensor]:
        if self.structure == "unit":
            return {"units": left_K}
        D_RI, U_ER = part.tensors["down"], part.tensors["up"]
        down_K, up_K = left_K.split([D_RI.numel(), U_ER.numel()])
        return {"down": down_K.view_as(D_RI), "up": up_K.view_as(U_ER)}

    @torch.no_grad()
    def forget(self, part: Part, optimiser: torch.optim.Optimizer) -> None:
        """Clear what the optimiser remembers of pruned weights, which would move them once more."""
        for kind, mask in part.layer.masks(self.adapter).items():
            tensor = part.tensors.get(kind)
            if tensor is None or tensor not in optimiser.state:
                continue
            for moment in optimiser.state[tensor].values():
                if moment.shape == tensor.shape:  # its count of steps is no moment
                    moment.masked_fill_(~mask, 0)


def _mix(means: dict[str, Tensor], key: str, new: Tensor) -> None:
    if key not in means:
        means[key] = torch.zeros_like(new)
    means[key].lerp_(new, 1 - maths.DECAY)


def _threshold(weight: Tensor, row: Mapping[str, Any], state: Mapping[Tensor, Any], l1: float) -> Tensor | float:
    memory = state.get(weight, {})
    if "exp_avg_sq" not in memory:
        return row["lr"] * l1
    squares, step = memory["exp_avg_sq"], float(memory["step"])
    return maths.adam_threshold(row["lr"], l1, squares, step, row["betas"][1], row["eps"])
