"""Cross-entropy over a large vocabulary with one copy of the logits. S supervised positions, V words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK = {"cpu": 2**20}
"""Logits turned to fp32 at once: a few MB stay in a CPU's cache; a GPU wants fewer, larger kernels."""


def _chunks(logits_SV: Tensor) -> Iterator[slice]:
    size = max(1, CHUNK.get(logits_SV.device.type, 2**24) // logits_SV.shape[1])
    return (slice(at, at + size) for at in range(0, logits_SV.shape[0], size))


class _CrossEntropySum(torch.autograd.Function):
    """Sum of -log softmax(logits)[target] in fp32 (fp64 for fp64 logits).

    The backward pass writes the gradient over the logits. No layer that ends in a product or a sum needs its own
    output again; one that does is told so by autograd's version counter.
    """

    @staticmethod
    def forward(ctx: Any, logits_SV: Tensor, targets_S: Tensor) -> Tensor:
        wide = torch.float64 if logits_SV.dtype == torch.float64 else torch.float32
        log_total_S = torch.empty(len(targets_S), dtype=wide, device=logits_SV.device)
        for part in _chunks(logits_SV):
            torch.logsumexp(logits_SV[part].to(wide), dim=-1, out=log_total_S[part])
        ctx.save_for_backward(logits_SV, targets_S, log_total_S)
        return (log_total_S - logits_SV.gather(1, targets_S[:, None])[:, 0].to(wide)).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits_SV, targets_S, log_total_S = ctx.saved_tensors
        for part in _chunks(logits_SV):
            wide_SV = logits_SV[part].to(log_total_S.dtype, copy=True)
            wide_SV.sub_(log_total_S[part, None]).exp_()
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
