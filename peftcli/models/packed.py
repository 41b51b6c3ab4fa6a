"""Linear layers whose weight is not simply a tensor of its own: packed in few bits, or shared with another layer.

Shapes: O outputs, I inputs of a layer.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftcli.config.errors import Mistake, UserError

KINDS = {torch.uint8: "nf4", torch.int8: "int8"}


def is_packed(layer: nn.Module) -> bool:
    """Whether it is a linear layer without a floating-point weight."""
    return isinstance(layer, nn.Linear) and not layer.weight.is_floating_point()


def check_mergeable(layer: nn.Module) -> None:
    """Stop before an adapter is added to a weight in place.

    Raises:
        UserError: The weight is in few bits.
    """
    if is_packed(layer):
        what = "an adapter cannot be merged into a weight in few bits without rounding it again"
        raise UserError(Mistake(what, hint="peft merge RUN makes the base whole first"))


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The packed layers of a model, by name."""
    yield from ((name, module) for name, module in model.named_modules() if is_packed(module))


def kind(model: nn.Module) -> str | None:
    """How the weights are packed, as `model.quantization` says it; None where they are whole."""
    return next((KINDS.get(layer.weight.dtype) for _, layer in layers(model)), None)


def shape(layer: Any) -> torch.Size:
    """Shape of the weight, whatever its packing: [O, I], or of a convolution [O, I, height, width]."""
    return torch.Size((layer.out_features, layer.in_features)) if is_packed(layer) else layer.weight.shape


def weight(layer: Any) -> Tensor:
    """The weight; a packed one anew in float32 [O, I], as the layer's own product sees it but for later rounding.

    Raises:
        UserError: It is packed in a way that bitsandbytes does not know.
    """
    if not is_packed(layer):
        return layer.weight  # type: ignore[no-any-return]
    if layer.weight.is_meta:
        return torch.empty(shape(layer), device="meta")
    if state := getattr(layer.weight, "quant_state", None):
        from bitsandbytes.functional import dequantize_4bit

        state = copy.copy(state)
        state.dtype = torch.float32  # else the values are rounded to the type that was packed
        return dequantize_4bit(layer.weight.data, state)
    scales_O = layer.state.SCB if getattr(layer.weight, "SCB", None) is None else layer.weight.SCB  # moves at first use
    if scales_O is None:
        raise UserError(Mistake(f"a weight of {layer.weight.dtype} numbers in a {type(layer).__name__} cannot be read"))
    return layer.weight.data.float() * (scales_O.float() / 127)[:, None]


def entries(model: nn.Module) -> dict[str, int]:
    """Entries of every parameter by name: of a packed weight, those that it stands for."""
    found = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return found | {f"{name}.weight": shape(layer).numel() for name, layer in layers(model)}


def shared(model: nn.Module) -> set[int]:
    """`id` of every parameter that is more than one module's (an output layer that is the embedding too)."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return {parameter for parameter, count in owners.items() if count > 1}


class Weights(Mapping[str, Tensor]):
    """Weights of layers by name; a packed one is unpacked each time it is looked at, and not kept."""

    def __init__(self, layers: Mapping[str, Any]):
        self._layers = layers

    def __getitem__(self, name: str) -> Tensor:
        return weight(self._layers[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)
