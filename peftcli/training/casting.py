"""Autocast and PEFT both cast an adapter's inputs; one of them is enough."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


@contextmanager
def left_to_autocast(model: nn.Module, active: bool) -> Iterator[None]:
    """Within it PEFT's layers leave their inputs as they are: autocast casts each where it is used.

    As `peft.helpers.disable_input_dtype_casting`, which stops at tuners that have no such switch (IA3 in PEFT 0.21).

    Args:
        model: With an adapter in it, or without.
        active: Whether there is an autocast to leave it to.
    """
    layers: list[Any] = [
        m for m in model.modules() if isinstance(m, BaseTunerLayer) and hasattr(m, "cast_input_dtype_enabled")
    ]
    before = [layer.cast_input_dtype_enabled for layer in layers]
    for layer in layers if active else ():
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.cast_input_dtype_enabled = value
