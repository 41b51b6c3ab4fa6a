"""The gradient of the loss on calibration rows with respect to tensors of the untouched base, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from math import isfinite

import torch
from torch import Tensor, nn

from peftcli.config.errors import CheckFailed
from peftcli.methods.contract import Calibration

Weights = Mapping[str, Tensor]
"""Frozen parameters by a name of the caller's."""


def visit(
    model: nn.Module, weights: Weights, calibration: Calibration, batches: int, take: Callable[[str, Tensor], None]
) -> tuple[float, int]:
    """Show the gradient of every weight on every batch, and let go of it at once.

    Args:
        model: The untouched base; in evaluation mode meanwhile.
        weights: Which of its parameters.
        calibration: The rows, and the loss.
        batches: Most batches to look at.
        take: Called with a name and the gradient of a batch's mean loss, in the parameter's shape and type.

    Returns:
        The mean loss, and the number of batches.

    Raises:
        CheckFailed: `no-trainable-tokens`: there is no batch; `non-finite-loss`, on one of them.
    """
    losses: list[float] = []
    with _watched(model, weights, take), torch.enable_grad():
        for batch in islice(calibration.batches, batches):
            loss = calibration.loss(model, batch)
            losses.append(float(loss.detach()))
            if not isfinite(losses[-1]):
                what = f"the loss on the calibration rows is {losses[-1]}"
                raise CheckFailed("non-finite-loss", what, "look at the base model")
            loss.backward()
    if not losses:
        raise CheckFailed("no-trainable-tokens", "there is no batch to look at before training")
    return sum(losses) / len(losses), len(losses)


@contextmanager
def _watched(model: nn.Module, weights: Weights, take: Callable[[str, Tensor], None]) -> Iterator[None]:
    training = model.training
    hooks = []
    for name, weight in weights.items():
        weight.requires_grad_(True)
        hooks.append(weight.register_post_accumulate_grad_hook(_taker(name, take)))
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
        for weight in weights.values():
            weight.requires_grad_(False)
            weight.grad = None


def _taker(name: str, take: Callable[[str, Tensor], None]) -> Callable[[Tensor], None]:
    def hand_over(weight: Tensor) -> None:
        assert weight.grad is not None
        take(name, weight.grad)
        weight.grad = None

    return hand_over


def mean(model: nn.Module, weights: Weights, calibration: Calibration, batches: int) -> dict[str, Tensor]:
    """The gradients of the mean loss, in float32 (float64 where the weights are); see `visit`."""
    sums = {
        name: torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32), requires_grad=False)
        for name, weight in weights.items()
    }

    def add(name: str, G: Tensor) -> None:
        sums[name] += G

    _, count = visit(model, weights, calibration, batches, add)
    return {name: total.div_(count) for name, total in sums.items()}
