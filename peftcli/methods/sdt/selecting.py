"""What a calibration set says of each block's channels. Shapes: D channels, N states."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peftcli.methods import gradients
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

    Raises:
        CheckFailed: As `gradients.visit`.
    """

    def __init__(self, model: nn.Module, mixers: Mixers, calibration: Calibration, batches: int):
        self.pairs: dict[str, Tensor] = {}
        self.columns: dict[str, Tensor] = {}
        self.channels: dict[str, Tensor] = {}
        scored = {
            f"{name}.{part}": tensor
            for name, mixer in mixers.items()
            for part, tensor in (
                ("A_log", mixer.A_log), ("x_proj", mixer.x_proj.weight), ("out_proj", mixer.out_proj.weight)
            )
        }  # fmt: skip

        def add(key: str, gradient: Tensor) -> None:
            name, _, part = key.rpartition(".")
            states = mixers[name].A_log.shape[1]
            if part == "A_log":
                sums, value = self.pairs, maths.taylor_pairs(gradient)
            elif part == "x_proj":
                sums, value = self.columns, maths.taylor_columns(scored[key], gradient, states)
            else:
                sums, value = self.channels, (scored[key].detach().double() * gradient.double()).abs().sum(0).cpu()
            sums[name] = sums[name] + value if name in sums else value

        _, self.batches = gradients.visit(model, scored, calibration, batches, add)
