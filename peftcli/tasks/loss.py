"""Cross-entropy over a large vocabulary with one copy of the logits. S supervised positions, V words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = {"cpu": 2**20}
"""Logits turned to fp32 at once: a few MB stay in a CPU's cache; a GPU wants fewer, larger kernels."""


def _chunks(logits_SV: Tensor) -> Iterator[slice]:
    size = max(1, CHUNK.get(logits_SV.device.type, 2**24) // logits_SV.shape[1])
    return (slice(at, at + size) for at in range(0, logits_SV.shape[0], size))


def _wide(logits_SV: Tensor) -> torch.dtype:
    return torch.float64 if logits_SV.dtype == torch.float64 else torch.float32


class _CrossEntropySum(torch.autograd.Function):
    """Sum of -log softmax(logits)[target] in fp32 (fp64 for fp64 logits).

    The backward pass writes the gradient over the logits. No layer that ends in a product or a sum needs its own
    output again; one that does is told so by autograd's version counter.
    """

    @staticmethod
    def forward(ctx: Any, logits_SV: Tensor, targets_S: Tensor) -> Tensor:
        ctx.save_for_backward(logits_SV, targets_S)
        total = torch.zeros((), dtype=_wide(logits_SV), device=logits_SV.device)
        for part in _chunks(logits_SV):
            total += F.cross_entropy(logits_SV[part].to(total.dtype), targets_S[part], reduction="sum")
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits_SV, targets_S = ctx.saved_tensors
        for part in _chunks(logits_SV):
            wide_SV = torch.softmax(logits_SV[part], dim=-1, dtype=_wide(logits_SV))
            wide_SV[torch.arange(len(wide_SV), device=wide_SV.device), targets_S[part]] -= 1
            logits_SV[part] = wide_SV.mul_(grad)
        return logits_SV, None


def cross_entropy_sum(logits_SV: Tensor, targets_S: Tensor) -> Tensor:
    """Summed cross-entropy; its backward pass uses the logits up.

    Args:
        logits_SV: Scores [S, V] in any float type, a tensor nobody else needs.
        targets_S: Right words, int64 [S].

    Returns:
        fp32 scalar (fp64 for fp64 logits), equal to `F.cross_entropy(logits.float(), targets, reduction="sum")`.
    """
    return _CrossEntropySum.apply(logits_SV, targets_S)


def cross_entropy_each(logits_SV: Tensor, targets_S: Tensor) -> Tensor:
    """Cross-entropy of each position, to measure without gradients: fp32 [S] (fp64 for fp64 logits)."""
    parts = [
        F.cross_entropy(logits_SV[part].to(_wide(logits_SV)), targets_S[part], reduction="none")
        for part in _chunks(logits_SV)
    ]
    return torch.cat(parts) if parts else logits_SV.new_zeros(0)
