"""A model that is trained whole, in float32: small steps would be rounded away in half precision."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from peftcli.methods.contract import Form
from peftcli.models.family import Family


def widen(model: nn.Module) -> None:
    """Make every floating-point parameter float32, one after another; each stays the parameter that it was."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()


def release(model: nn.Module, family: Family) -> None:
    """Let everything be trained that takes part in the forward pass, and nothing else."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and family.learns(name))


def beside_original(layers: Mapping[str, nn.Module], name: str) -> list[Form]:
    """The forms of a model that was made of another one.

    Args:
        layers: The original's, by the names of those that stand in their places; they become float32, as what was
            made of them is, so that bytes and times compare.
        name: Of what was made.
    """
    return [Form("original", {place: layer.float() for place, layer in layers.items()}), Form(name, {})]
