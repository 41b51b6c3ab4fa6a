"""What SMAT adds to a model, kept beside its layers: the shared change, the masks, the multipliers, the router.

No layer of the model is replaced. P the shape of a weight, K mask entries, M experts, D features.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peftcli.methods.smat import maths
from peftcli.methods.smat.config import SmatConfig
from peftcli.methods.smat.masks import Layout, convolutions, layout, weights_of
from peftcli.methods.smat.router import Router

START = 0.5
"""Deviation of the mask logits at the start."""


def key(name: str) -> str:
    """A weight's name as a parameter of ours is called; module names have dots, names of parameters may not."""
    return name.replace(".", "/")


class SmatLayer(nn.Module, BaseTunerLayer):
    """The tensors of each adapter.

    Attributes:
        smat_delta: By adapter, the change of each weight, P each.
        smat_logits: By adapter, the masks' logits, [K, M].
        smat_multipliers: By adapter, of the sparsity constraints, [M].
        smat_router: By adapter, from prototypes to the experts' logits.
        layouts: By adapter, which mask entries cover which weights.
    """

    adapter_layer_names: tuple[str, ...] = ("smat_delta", "smat_logits", "smat_multipliers", "smat_router")
    other_param_names: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.smat_delta, self.smat_router = nn.ModuleDict(), nn.ModuleDict()
        self.smat_logits, self.smat_multipliers = nn.ParameterDict(), nn.ParameterDict()
        self.layouts: dict[str, Layout] = {}
        self._counts: dict[str, Tensor] = {}
        self._disable_adapters, self._active_adapter, self.merged_adapters = False, [], []

    def update_layer(self, adapter: str, config: SmatConfig, model: nn.Module, width: int) -> None:
        """Make an adapter's tensors, whose change is zero.

        Args:
            adapter: Its name.
            config: Its configuration.
            model: The base, without this layer in it.
            width: D.
        """
        weights = weights_of(model)
        if config.weights is not None:
            weights = {name: weights[name] for name in config.weights}
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        found = layout(shapes, convolutions(model), config.structured)
        like = next(iter(weights.values()))
        kind = torch.promote_types(like.dtype, torch.float32)
        made: dict[str, Any] = {"device": like.device, "dtype": kind}
        self.layouts[adapter] = found
        self.smat_delta[adapter] = nn.ParameterDict({key(n): torch.zeros(s, **made) for n, s in shapes.items()})
        self.smat_logits[adapter] = nn.Parameter(START * torch.randn(found.entries, config.experts, **made))
        self.smat_multipliers[adapter] = nn.Parameter(torch.zeros(config.experts, **made))
        self.smat_router[adapter] = Router(width, config.experts).to(**made)

    def counts(self, adapter: str) -> Tensor:
        """How many weights each mask entry covers, [K]."""
        logits_KM = self.smat_logits[adapter]
        if adapter not in self._counts or self._counts[adapter].device != logits_KM.device:
            self._counts[adapter] = self.layouts[adapter].counts().to(logits_KM)
        return self._counts[adapter]

    def masks(self, adapter: str, stochastic: bool = False) -> Tensor:
        """The masks [K, M]."""
        logits_KM = self.smat_logits[adapter].clamp(*maths.LIMITS)
        noise_KM = torch.rand_like(logits_KM).clamp(maths.TINY, 1 - maths.TINY) if stochastic else None
        return maths.mask(logits_KM, noise_KM)

    def task_weights(self, adapter: str, base: dict[str, Tensor], gate_K: Tensor) -> dict[str, Tensor]:
        """The weights of a task by name: those of the base, each plus its gated change."""
        gates = self.layouts[adapter].gates(gate_K)
        return {name: maths.merge(base[name], self.delta(adapter, name), gate) for name, gate in gates.items()}

    def delta(self, adapter: str, name: str) -> Tensor:
        """The change of a weight of the base, by its name there."""
        changes: Any = self.smat_delta[adapter]
        return changes[key(name)]
