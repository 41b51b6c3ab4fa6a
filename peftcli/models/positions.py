"""The vocabulary matrix sees only the positions that a loss needs.

Shapes: B rows, L tokens a row, D width of the model, V words, S selected positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def select(model: Any, mask_BL: torch.Tensor) -> Iterator[None]:
    """Within it, `model(...).logits` is `[S, V]`: the rows where `mask_BL` is true, in row-major order.

    Loss and gradients equal those of selecting from the full `[B, L, V]` logits, which are never made. Works on plain
    and on adapted models; prompt tuning puts virtual tokens before the row, so positions count from the row's end.

    Args:
        model: A model with an output embedding (`get_output_embeddings`), wrapped for several processes or not.
        mask_BL: Boolean; true where logits are wanted. `logits[i]` predict the token after the i-th true position.
    """
    selected_BL = mask_BL.bool()

    def gather(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden_BLD, *rest = inputs
        return hidden_BLD[:, -selected_BL.shape[1] :][selected_BL], *rest

    # DistributedDataParallel passes no attribute on to what it wraps.
    handle = getattr(model, "module", model).get_output_embeddings().register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()
