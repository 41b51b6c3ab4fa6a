"""A stage of ResNet in the layout of HaLViT (CVPR 2024 workshops; arXiv 2401.16438): one 1x1 matrix for all blocks.

The stage first grows its channels by a depthwise 3x3 convolution; after that every block has as many going in as coming
out, and narrows by W [M, 4 M] and widens by Wᵀ, the same W in each. Only the 3x3 convolutions and BatchNorms are a
block's own. Where the stage strides, the shortcut is a depthwise convolution with two BatchNorms, as in the authors'
code. Modules have the names that Transformers gives them.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.resnet.modeling_resnet import ResNetBottleNeckLayer

from peftcli.models.compact.layers import TiedConv2d, tied


class Grow(nn.Module):
    """More channels: what a depthwise convolution makes of them is put before them.

    Args:
        inputs: Channels before.
        outputs: Channels after; what is added is a multiple of `inputs`.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs - inputs, 3, padding=1, groups=inputs, bias=False)
        self.normalization = nn.BatchNorm2d(outputs - inputs)
        self.activation = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, height, width] -> [B, outputs, height, width]."""
        return torch.cat([self.activation(self.normalization(self.convolution(x))), x], dim=1)


def lay_out(stage: Any, config: Any) -> None:
    """Give a stage of a Transformers ResNet with bottlenecks this layout, in place.

    Args:
        stage: With its layers as Transformers built them.
        config: The model's configuration.
    """
    first, depth = stage.layers[0], len(stage.layers)
    inputs, outputs = first.layer[0].convolution.in_channels, first.layer[2].convolution.out_channels
    stride = max(part.convolution.stride[0] for part in first.layer)
    weight = first.layer[0].convolution.weight
    blocks = [
        ResNetBottleNeckLayer(outputs, outputs, stride if place == 0 else 1, config.hidden_act)
        for place in range(depth)
    ]
    if stride != 1:
        blocks[0].shortcut = nn.Sequential(  # type: ignore[assignment]  # Transformers knows two kinds
            OrderedDict(
                convolution=nn.Conv2d(outputs, outputs, 3, stride, 1, groups=outputs, bias=False),
                normalization=nn.BatchNorm2d(outputs),
                normalization_again=nn.BatchNorm2d(outputs),
            )
        )
    shared = blocks[0].layer[0].convolution
    for block in blocks:
        narrow, wide = block.layer[0], block.layer[2]
        if block is not blocks[0]:
            narrow.convolution = tied(narrow.convolution, shared, transposed=False, diagonal=False)
        wide.convolution = tied(wide.convolution, shared, transposed=True, diagonal=False)
    grown = {"grow": Grow(inputs, outputs)} if inputs != outputs else {}
    layers = OrderedDict(**grown, **{str(place): block for place, block in enumerate(blocks)})
    stage.layers = nn.Sequential(layers).to(device=weight.device, dtype=weight.dtype)


def shared_matrices(model: nn.Module) -> list[nn.Parameter]:
    """W of every stage in this layout."""
    found = {id(m.source): m.source.weight for m in model.modules() if isinstance(m, TiedConv2d)}
    return list(found.values())
