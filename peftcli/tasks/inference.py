"""The model with nothing trained: batches in, numbers or text out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peftcli.data.collate import MULTIPLE, pad
from peftcli.models.precision import autocast
from peftcli.tasks.tokens import pad_id


@contextmanager
def measuring(model: nn.Module, device: Any, precision: str) -> Iterator[None]:
    """Dropout off, no gradients, the given arithmetic; each module's own mode comes back afterwards.

    Not `model.train(was_training)`: that would wake a frozen BatchNorm which somebody had put to rest.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode(), autocast(precision, device):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def to_batch(rows: list[dict[str, Any]], tokenizer: Any, device: Any, side: str = "right") -> dict[str, Tensor]:
    """Encoded rows as tensors on the device."""
    return {name: value.to(device) for name, value in pad(rows, pad_id(tokenizer), side, MULTIPLE).items()}


def marked(ids: list[int], learnt: list[bool], tokenizer: Any) -> list[tuple[str, bool]]:
    """Token ids as stretches of text, each learnt or not. Text is cut by decoding from the start each time, because
    some tokenizers drop the space of the first token they decode."""
    bounds = [0, *(i for i in range(1, len(ids)) if learnt[i] != learnt[i - 1]), len(ids)]
    texts = [tokenizer.decode(ids[:bound]) for bound in bounds]
    return [
        (texts[k + 1][len(texts[k]) :], learnt[bounds[k]]) for k in range(len(bounds) - 1) if bounds[k] < bounds[k + 1]
    ]
