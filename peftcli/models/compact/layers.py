"""Layers of compact models: smaller ones in the place of one, and one that uses another's weight.

A tied layer has no weight of its own. It holds the other layer and not its weight, and not as a sub-module, so that
there is one parameter in the model and one tensor in a file, and copying, moving or casting the model keeps the two
together.

Letters: O outputs, I inputs of this layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Factored(nn.Sequential):
    """Smaller layers one after the other, in the place of one."""


class Tied(nn.Module):
    """What both kinds of tied layers have.

    Args:
        source: The layer with the weight, in the same model; [O, I], or [I, O] where `transposed`.
        transposed: Use the weight by its other side.
        bias: Have a bias [O].
        diagonal: Have a factor for each input [I].
    """

    bias: nn.Parameter | None
    diagonal: nn.Parameter | None

    def __init__(self, source: nn.Module, transposed: bool, bias: bool, diagonal: bool):
        super().__init__()
        self._source: tuple[Any, ...] = (source,)  # in a tuple, which `Module` does not register
        self.transposed = transposed
        outputs, inputs = self.weight.shape[:2]
        made: dict[str, Any] = {"dtype": self.weight.dtype, "device": self.weight.device}
        self.register_parameter("bias", nn.Parameter(torch.zeros(outputs, **made)) if bias else None)
        self.register_parameter("diagonal", nn.Parameter(torch.ones(inputs, **made)) if diagonal else None)

    @property
    def source(self) -> Any:
        """The layer with the weight."""
        return self._source[0]

    @property
    def weight(self) -> Tensor:
        """The other layer's weight as this one uses it, [O, I] or [O, I, 1, 1]."""
        weight: Tensor = self.source.weight
        return weight.transpose(0, 1) if self.transposed else weight

    def extra_repr(self) -> str:
        """Shape and use."""
        outputs, inputs = self.weight.shape[:2]
        return f"{inputs}, {outputs}, {'transposed, ' if self.transposed else ''}diagonal={self.diagonal is not None}"


class TiedLinear(Tied):
    """y = W s x + b with another layer's W or Wᵀ."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return functional.linear(x if self.diagonal is None else x * self.diagonal, self.weight, self.bias)


class TiedConv2d(Tied):
    """The same with a 1x1 convolution.

    Args:
        stride: Of this one.
    """

    def __init__(self, source: nn.Module, transposed: bool, bias: bool, diagonal: bool, stride: Any = 1):
        super().__init__(source, transposed, bias, diagonal)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """[B, I, height, width] -> [B, O, height, width]."""
        x = x if self.diagonal is None else x * self.diagonal[:, None, None]
        return functional.conv2d(x, self.weight, self.bias, self.stride)


def tied(layer: Any, source: Any, transposed: bool, diagonal: bool) -> Tied:
    """What takes the place of a linear layer or a 1x1 convolution."""
    if isinstance(layer, nn.Linear):
        return TiedLinear(source, transposed, layer.bias is not None, diagonal)
    return TiedConv2d(source, transposed, layer.bias is not None, diagonal, layer.stride)
