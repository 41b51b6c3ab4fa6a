"""Second moments of what goes into layers, C = E[x xᵀ], summed over calibration batches in float64.

Padding counts for nothing. Of a batch with very many positions, as early convolutions have them, evenly spaced ones are
looked at, as many however it is cut into micro-batches.

Letters: B rows, L positions, I inputs (of a convolution its channels times its window), N positions that are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from peftcli.config.errors import CheckFailed
from peftcli.methods.contract import Calibration
from peftcli.methods.rowcol import maths
from peftcli.methods.rowcol.convolution import patches
from peftcli.models import packed

TOGETHER = 2**27
"""Numbers of the moments that are summed in one pass over the batches; they take 1 GB."""
POSITIONS = 2**12
"""Positions of a batch that are looked at in a layer, at most."""


@dataclass
class Moment:
    """What has been seen at a layer's input.

    Attributes:
        sum: Of x xᵀ over positions [I, I], float64.
        first: Of x [I], float64.
        positions: How many there were.
    """

    sum: Tensor
    first: Tensor
    positions: int = 0

    @property
    def mean(self) -> Tensor:
        """C [I, I]."""
        return self.sum / max(self.positions, 1)

    @property
    def centre(self) -> Tensor:
        """The mean input [I]."""
        return self.first / max(self.positions, 1)


def width(layer: nn.Module) -> int:
    """I."""
    return packed.shape(layer)[1:].numel()


def visit(
    model: nn.Module, layers: Mapping[str, nn.Module], calibration: Calibration, batches: int
) -> Iterator[tuple[str, Moment]]:
    """The moment of each layer, one after the other; as many at once as memory is meant for, in several passes.

    Args:
        model: In evaluation mode meanwhile.
        layers: Linear or Conv2d modules of it, by name.
        calibration: The rows.
        batches: Most batches to look at.

    Raises:
        CheckFailed: `no-trainable-tokens`: there is no batch; `non-finite-loss`: an input is not finite.
    """
    for names in _portions({name: width(layer) ** 2 for name, layer in layers.items()}):
        found = _pass(model, {name: layers[name] for name in names}, calibration, batches)
        for name in names:
            moment = found.pop(name)
            if not torch.isfinite(moment.sum).all():
                what = f"what goes into {name} is not finite on the calibration rows"
                raise CheckFailed("non-finite-loss", what, "look at the base model")
            yield name, moment


def _portions(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    names: list[str] = []
    held = 0
    for name, size in sizes.items():
        if names and held + size > TOGETHER:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    if names:
        yield names


@dataclass
class _Now:
    """The micro-batch that goes through the model: its padding, and positions that are looked at in a layer at most."""

    mask_BL: Tensor | None = None
    most: int = POSITIONS


@torch.no_grad()
def _pass(
    model: nn.Module, layers: Mapping[str, nn.Module], calibration: Calibration, batches: int
) -> dict[str, Moment]:
    found: dict[str, Moment] = {}
    now = _Now()
    training, count = model.training, 0
    with ExitStack() as hooks:
        for name, layer in layers.items():
            size, device = width(layer), maths.place(next(layer.parameters()).device)
            made: dict[str, Any] = {"dtype": torch.float64, "device": device}
            found[name] = Moment(torch.zeros(size, size, **made), torch.zeros(size, **made))
            hooks.callback(layer.register_forward_pre_hook(_adder(layer, found[name], now)).remove)
        hooks.callback(model.train, training)
        model.eval()
        for batch in islice(calibration.batches, batches):
            count += 1
            now.most = max(1, POSITIONS // len(batch))
            for micro_batch in batch:
                now.mask_BL = micro_batch.get("attention_mask")
                calibration.loss(model, micro_batch)
    if not count:
        raise CheckFailed("no-trainable-tokens", "there is no batch to look at before training")
    return found


def _adder(layer: Any, moment: Moment, now: _Now) -> Callable[[Any, tuple[Tensor, ...]], None]:
    def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x_NI = _positions(inputs[0], layer, now.mask_BL)
        step = -(-len(x_NI) // now.most) or 1
        x_NI = maths.wide(x_NI[::step])
        moment.sum.addmm_(x_NI.mT, x_NI)
        moment.first += x_NI.sum(0)
        moment.positions += len(x_NI)

    return add


def _positions(x: Tensor, layer: Any, mask_BL: Tensor | None) -> Tensor:
    """Each position's input as a row [N, I], without padding."""
    if isinstance(layer, nn.Conv2d):
        return patches(x, layer)
    if mask_BL is not None and x.shape[:-1] == mask_BL.shape:
        return x[mask_BL != 0]
    return x.flatten(0, -2)
