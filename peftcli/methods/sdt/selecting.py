"""From a warm-up or a calibration set to each layer's scores.

Shapes: D channels, N states, P outputs of x_proj, E width of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from peftcli.config.errors import CheckFailed
from peftcli.methods.contract import Calibration
from peftcli.methods.sdt import maths

Mixers = dict[str, Any]
"""Blocks by name."""


class Gradients:
    """Sums over a calibration set, by block.

    Attributes:
        pairs: |A dL/dA| [D, N].
        columns: |W dL/dW| summed over the rows of x_proj that make B and C [D].
        channels: |W dL/dW| summed over the rows of out_proj [D]: what the loss would change, to first order, without
            the channel's output.
        batches: How many there were.
    """

    def __init__(self, model: nn.Module, mixers: Mixers, calibration: Calibration, batches: int):
        self.pairs: dict[str, Tensor] = {}
        self.columns: dict[str, Tensor] = {}
        self.channels: dict[str, Tensor] = {}
        self.batches = 0
        with _learning(mixers), torch.enable_grad():
            for batch in islice(calibration.batches, batches):
                calibration.loss(model, batch).backward()
                for name, mixer in mixers.items():
                    self._add(name, mixer)
                self.batches += 1
        if not self.batches:
            raise CheckFailed("no-trainable-tokens", "there is no batch to choose channels with")

    def _add(self, name: str, mixer: Any) -> None:
        x_proj, out_proj = mixer.x_proj.weight, mixer.out_proj.weight
        found = (
            (self.pairs, maths.taylor_pairs(mixer.A_log.grad)),
            (self.columns, maths.taylor_columns(x_proj, x_proj.grad, mixer.A_log.shape[1])),
            (self.channels, (out_proj.detach().double() * out_proj.grad.double()).abs().sum(0).cpu()),
        )
        for sums, value in found:
            sums[name] = sums[name] + value if name in sums else value
        for parameter in (mixer.A_log, x_proj, out_proj):
            parameter.grad = None


@contextmanager
def _learning(mixers: Mixers) -> Iterator[None]:
    """Within it the base's tensors that are scored get gradients; their values stay."""
    scored = [p for mixer in mixers.values() for p in (mixer.A_log, mixer.x_proj.weight, mixer.out_proj.weight)]
    for parameter in scored:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in scored:
            parameter.requires_grad_(False)
            parameter.grad = None
