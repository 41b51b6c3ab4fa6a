"""Initialisations that move a part of the base's weight into the factors, undone before the adapter is saved.

PiSSA and OLoRA train `W_res + s B A` with `W_res = W - s B0 A0`. A file with only A and B would need `W_res`, which no
one else has. The same function on the untouched base is a LoRA of twice the rank (PEFT's own conversion):
`s B A - s B0 A0 = s [B, -B0] [A; A0]`.

Shapes: R rank, I inputs, O outputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from peftcli.config.errors import Mistake, UserError
from peftcli.models import packed

INITS = ("pissa", "olora")


def moves_weights(init: object) -> bool:
    """Whether PEFT's `init_lora_weights` of this value changes the base's weights."""
    return str(init).startswith(INITS)


class Rearrangement:
    """Remembers the base's own weights; made before the adapter goes in.

    Args:
        model: The untouched base model.
        names: Full names of the modules that will be adapted.

    Raises:
        UserError: One of them is in few bits.
    """

    def __init__(self, model: Any, names: Collection[str]):
        for name in names:
            if packed.is_packed(model.get_submodule(name)):
                what = f"{name} is in few bits, and an initialisation that moves a part of it would round it again"
                raise UserError(Mistake(what, hint="init_lora_weights=true (method.init=default), or a whole base"))
        self._weights_OI = {name: model.get_submodule(name).weight.detach().clone() for name in names}
        self._factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def start(self, model: Any) -> None:
        """Remember the factors' first values; called once the adapter is in."""
        for name, layer, adapter in _layers(model):
            A_RI, B_OR = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            self._factors[name] = (A_RI.detach().clone(), B_OR.detach().clone())

    @torch.no_grad()
    def undo(self, model: Any) -> None:
        """Give the base its weights back bit for bit and write the change as a LoRA of twice the rank, in place."""
        for name, layer, adapter in _layers(model):
            A_RI, B_OR = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            A0_RI, B0_OR = self._factors[name]
            layer.get_base_layer().weight.data = self._weights_OI[name]
            layer.lora_A[adapter] = _linear(torch.cat([A_RI, A0_RI], dim=0))
            layer.lora_B[adapter] = _linear(torch.cat([B_OR, -B0_OR], dim=1))
            layer.r[adapter] *= 2
            layer.lora_alpha[adapter] *= 2**0.5 if model.peft_config[adapter].use_rslora else 2
        for config in model.peft_config.values():
            config.r *= 2
            config.lora_alpha *= 2**0.5 if config.use_rslora else 2
            config.init_lora_weights = True


def _layers(model: Any) -> Iterator[tuple[str, Any, str]]:
    """The adapted modules by the names they have in the base, with the adapter's name."""
    adapter = model.active_adapter
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            yield name, module, adapter


def _linear(weight_OI: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight_OI)
    return layer
