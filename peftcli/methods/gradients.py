"""The gradient of the loss on calibration rows with respect to tensors of the untouched base, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from peftcli.config.errors import CheckFailed
from peftcli.methods.contract import Calibration, shared
from peftcli.models import packed

Weights = Mapping[str, Tensor]
"""Frozen parameters by a name of the caller's."""
Watched = Mapping[str, Tensor | nn.Module]
"""The same; a linear layer in a parameter's place stands for a weight that cannot have a gradient (it is packed in few
bits), or whose gradient would be more than this layer's (it is another layer's too)."""


def watched(model: nn.Module, layers: Mapping[str, Any]) -> Watched:
    """The weights of layers; in place of one that is packed in few bits, or another layer's too, the layer."""
    others = packed.shared(model)
    return {
        name: layer if packed.is_packed(layer) or id(layer.weight) in others else layer.weight
        for name, layer in layers.items()
    }


def visit(
    model: nn.Module, weights: Watched, calibration: Calibration, batches: int, take: Callable[[str, Tensor], None]
) -> tuple[float, int]:
    """Show the gradient of every weight on every micro-batch, and let go of it at once.

    Args:
        model: The untouched base; in evaluation mode meanwhile.
        weights: Which of its parameters, or layers in place of their weights.
        calibration: The rows, and the loss.
        batches: Most batches to look at.
        take: Called with a name and a gradient in the parameter's shape and type: of a batch's mean loss, or of the
            part of it that a micro-batch makes; these add up to it.

    Returns:
        The mean loss, and the number of batches.

    Raises:
        CheckFailed: `no-trainable-tokens`: there is no batch; `non-finite-loss`, on one of them.
    """
    losses: list[float] = []
    with _watched(model, weights, take), torch.enable_grad():
        for batch in islice(calibration.batches, batches):
            losses.append(0.0)
            for micro_batch, share in shared(batch):
                loss = calibration.loss(model, micro_batch) * share
                losses[-1] += float(loss.detach())
                if not isfinite(losses[-1]):
                    what = f"the loss on the calibration rows is {losses[-1]}"
                    raise CheckFailed("non-finite-loss", what, "look at the base model")
                loss.backward()
    if not losses:
        raise CheckFailed("no-trainable-tokens", "there is no batch to look at before training")
    return sum(losses) / len(losses), len(losses)


@contextmanager
def _watched(model: nn.Module, weights: Watched, take: Callable[[str, Tensor], None]) -> Iterator[None]:
    training = model.training
    parameters = {name: weight for name, weight in weights.items() if isinstance(weight, Tensor)}
    hooks = []
    for name, weight in weights.items():
        if isinstance(weight, Tensor):
            weight.requires_grad_(True)
            hooks.append(weight.register_post_accumulate_grad_hook(_taker(name, take)))
        else:
            hooks.append(weight.register_forward_hook(_product(name, take)))
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
        for weight in parameters.values():
            weight.requires_grad_(False)
            weight.grad = None


def _taker(name: str, take: Callable[[str, Tensor], None]) -> Callable[[Tensor], None]:
    def hand_over(weight: Tensor) -> None:
        assert weight.grad is not None
        take(name, weight.grad)
        weight.grad = None

    return hand_over


def _product(name: str, take: Callable[[str, Tensor], None]) -> Callable[[Any, Any, Tensor], Tensor]:
    """A forward hook that hands over gᵀ x, where g is the gradient of a linear layer's outputs and x its inputs."""

    def watch(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0].detach()
        # Below the first watched layer nothing may need a gradient: then the graph begins here.
        watched = output if output.requires_grad else output.detach().requires_grad_()
        watched.register_hook(lambda g: take(name, g.flatten(0, -2).T @ x.flatten(0, -2).to(g.dtype)))
        return watched

    return watch


def mean(model: nn.Module, weights: Watched, calibration: Calibration, batches: int) -> dict[str, Tensor]:
    """The gradients of the mean loss, in float32 (float64 where the weights are); see `visit`."""
    sums = {name: _zeros(weight) for name, weight in weights.items()}

    def add(name: str, G: Tensor) -> None:
        sums[name] += G

    _, count = visit(model, weights, calibration, batches, add)
    return {name: total.div_(count) for name, total in sums.items()}


def _zeros(weight: Any) -> Tensor:
    values = weight if isinstance(weight, Tensor) else weight.weight
    size = weight.shape if isinstance(weight, Tensor) else packed.shape(weight)
    return torch.zeros(size, dtype=torch.promote_types(values.dtype, torch.float32), device=values.device)
