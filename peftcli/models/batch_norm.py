"""BatchNorm that stays as it was trained: a small batch of other pictures would spoil its statistics unnoticed.

It stays in evaluation mode whatever `train()` says, so its outputs do not depend on the batch and its running mean
and variance keep their bits. Where a recipe trains it, its buffers are part of what is trained and saved. Either way
it is float32 in a model of 16 bits, as everywhere in the field: statistics of eight bits would be off by a percent.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class _Resting(_BatchNorm):
    """Evaluation mode for good."""

    def train(self, mode: bool = True):
        return super().train(False)


class RestingBatchNorm1d(_Resting, nn.BatchNorm1d):
    """As `nn.BatchNorm1d`, always in evaluation mode."""


class RestingBatchNorm2d(_Resting, nn.BatchNorm2d):
    """As `nn.BatchNorm2d`, always in evaluation mode."""


RESTING: dict[type, type] = {nn.BatchNorm1d: RestingBatchNorm1d, nn.BatchNorm2d: RestingBatchNorm2d}


KEPT = ("normalization.weight", "normalization.bias", "running_mean", "running_var")
"""Ends of the names in a checkpoint of ResNet that are read as they are."""
HALF = (torch.bfloat16, torch.float16)


def keep_exact() -> None:
    """Tell Transformers to read a ResNet's BatchNorm in float32, whatever type the rest is read in."""
    from transformers.models.resnet.modeling_resnet import ResNetPreTrainedModel

    ResNetPreTrainedModel._keep_in_fp32_modules_strict = set(KEPT)


def widen(model: nn.Module) -> None:
    """Make every BatchNorm of 16 bits float32, in place."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and any(t.dtype in HALF for t in [*module.parameters(), *module.buffers()]):
            module.float()


def rest(model: nn.Module) -> int:
    """Put every BatchNorm to rest, in place; returns how many there are. Names and tensors stay what they are."""
    found = [module for module in model.modules() if type(module) in RESTING]
    for module in found:
        module.__class__ = RESTING[type(module)]
        module.eval()
    return len(found)


def awake(model: nn.Module) -> list[str]:
    """Full names of the BatchNorms whose statistics move in training."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and not isinstance(module, _Resting)
    ]


def statistics(model: nn.Module) -> set[str]:
    """Names of the buffers that training moves: those of each awake BatchNorm whose weights it trains."""
    moving = set()
    for place in awake(model):
        module = model.get_submodule(place)
        if any(parameter.requires_grad for parameter in module.parameters()):
            moving |= {f"{place}.{name}" for name, _ in module.named_buffers()}
    return moving
