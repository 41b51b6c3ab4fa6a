"""What layers of a packed base hold and compute, without contents and without the package that would pack them.

For counting on the meta device. Shapes: T rows of input, O outputs, I inputs of a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

BLOCK, NESTED = 64, 256
"""4-bit weights with a scale of a byte each, and such scales with one in float32 each (QLoRA's double quantisation)."""


class Outline(nn.Linear):
    """A linear layer whose weight takes the bytes of a packed one.

    Args:
        layer: The whole one, on the meta device.
        kind: `nf4` or `int8`.
    """

    def __init__(self, layer: nn.Linear, kind: str):
        with torch.device("meta"):
            super().__init__(layer.in_features, layer.out_features, bias=False)
        entries, rows = self.weight.numel(), self.out_features
        if kind == "nf4":
            size, dtype, scales = (entries + 1) // 2, torch.uint8, -(-entries // BLOCK)
            scales += 4 * -(-scales // NESTED)
        else:
            size, dtype, scales = entries, torch.int8, 4 * rows
        self.weight = nn.Parameter(torch.empty(size, 1, dtype=dtype, device="meta"), requires_grad=False)
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8, device="meta"), persistent=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Outputs without contents, at the cost of unpacking the weight."""
        return _Product.apply(x, self.out_features, self.weight.dtype == torch.int8)  # type: ignore[no-any-return]


def trace(model: Any, kind: str) -> None:
    """Put outlines in the place of the layers that would be packed; Transformers says which."""
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    whole = get_keys_to_not_convert(model)
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and should_convert_module(name, whole):
            model.set_submodule(name, Outline(layer, kind))


class _Product(torch.autograd.Function):
    """x Wᵀ, where W [O, I] is unpacked for the product and again for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, outputs: int, keeps: bool) -> Tensor:
        ctx.shape, ctx.kept = (outputs, x.shape[-1]), x if keeps else None
        return x @ x.new_empty(ctx.shape).T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return g @ g.new_empty(ctx.shape), None, None
