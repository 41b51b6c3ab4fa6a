"""The vocabulary matrix sees only the positions that a loss needs.

Shapes: B rows, L tokens a row, D width of the model, V words, S selected positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

_selected: WeakKeyDictionary[nn.Module, torch.Tensor] = WeakKeyDictionary()
"""Where logits are wanted now, by output embedding."""


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
    head = getattr(model, "module", model).get_output_embeddings()
    handle = head.register_forward_pre_hook(gather)
    _selected[head] = selected_BL
    try:
        yield
    finally:
        handle.remove()
        del _selected[head]


def selected(model: Any) -> torch.Tensor | None:
    """The mask of the `select` that a plain model is within; None outside of one."""
    head = model.get_output_embeddings()
    return None if head is None else _selected.get(head)
