"""Sparse adapters as pure functions: proximal steps, importance, the schedule, which units and weights to keep.

The penalty is l1 sum |theta| + group sum over units sqrt(|G|) ||theta_G||, G a unit's row of D, column of U and gate.
It is never a part of the loss: the optimiser's step is followed by the proximal step of its size.

Sources: proximal steps: Parikh and Boyd, Proximal Algorithms, 2014; sparse group lasso, L1 first and then the group:
Simon et al., 2013; gates pruned by them: SoRA (Ding et al., EMNLP 2023). Scores: SNIP (Lee et al., ICLR 2019), Fisher
(Sung et al., NeurIPS 2021). Cubic schedule: Zhu and Gupta, 2017.

Shapes: R units, I inputs and E outputs of a module; K scored things of it, units or weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DECAY = 0.9
"""Of the running means of scores."""


def soft(x: Tensor, threshold: Tensor | float) -> Tensor:
    """The proximal step of threshold * |x|: x moved towards zero by the threshold, and exactly zero within it."""
    return x - torch.clamp(x, -threshold, threshold)  # type: ignore[arg-type]  # both numbers or both tensors


def adam_threshold(rate: float, strength: float, squares: Tensor, step: float, beta2: float, eps: float) -> Tensor:
    """The threshold of the L1 step in Adam's own metric, in which it is exact: rate * strength / (sqrt(v) + eps).

    At most the rate, which is the most that Adam would move a weight for a penalty within the loss. Without this limit
    a weight whose gradient has been zero so far (D, as long as U is zero) would be gone after one step.

    Args:
        rate: Learning rate.
        strength: Of the penalty.
        squares: Adam's running mean of squared gradients, not corrected yet.
        step: Steps that Adam has taken.
        beta2: Of Adam.
        eps: Of Adam.
    """
    metric = squares.sqrt().mul_((1 - beta2**step) ** -0.5).add_(eps)
    return metric.reciprocal_().mul_(strength).clamp_max_(1).mul_(rate)


def unit_factors(D_RI: Tensor, U_ER: Tensor, gate_R: Tensor | None, size: float) -> Tensor:
    """What the group step multiplies each unit with: max(1 - size sqrt(|G|) / ||theta_G||, 0), shape [R].

    In the plain metric: with Adam's there is no closed form, so under Adam this is an approximation.

    Args:
        D_RI: Rows of the units.
        U_ER: Columns of the units.
        gate_R: Their gates, where there are any.
        size: Learning rate times the strength of the penalty.
    """
    squares_R = D_RI.square().sum(1) + U_ER.square().sum(0)
    members = D_RI.shape[1] + U_ER.shape[0]
    if gate_R is not None:
        squares_R, members = squares_R + gate_R.square(), members + 1
    norm_R = squares_R.sqrt()
    left_R = (1 - size * math.sqrt(members) / norm_R).clamp_min(0)
    return torch.where(norm_R > 0, left_R, torch.zeros_like(left_R))


def score(kind: str, weight: Tensor, gradient: Tensor) -> Tensor:
    """Of each weight, on one batch: |weight x gradient| (`first_order`) or the squared gradient (`fisher`)."""
    return (weight * gradient).abs() if kind == "first_order" else gradient.square()


def magnitude(weight: Tensor) -> Tensor:
    """|weight| as a share of its matrix's mean: U starts at zero, and as it is would be pruned before D, all of it."""
    sizes = weight.detach().abs()
    return sizes / sizes.mean().clamp_min(torch.finfo(sizes.dtype).tiny)


def unit_scores(D_RI: Tensor, U_ER: Tensor, gate_R: Tensor | None) -> Tensor:
    """Scores of units [R]: the sums over their members' scores."""
    total_R = D_RI.sum(1) + U_ER.sum(0)
    return total_R if gate_R is None else total_R + gate_R


def cubic(step: int, steps: int, first: float, last: float) -> float:
    """Sparsity after `step` of `steps` steps: steep at first, when much can go, and flat towards its end."""
    if step >= steps:
        return last
    return last + (first - last) * (1 - max(step, 0) / steps) ** 3


def kept(sparsity: float, total: int) -> int:
    """How many of `total` a sparsity leaves; halves are kept."""
    return total - math.ceil(sparsity * total - 0.5)


def keep(scores: Sequence[Tensor], live: Sequence[Tensor], count: int, floor: int = 0) -> list[Tensor]:
    """The `count` live things with the highest scores over all modules, no more and no less; the first of equal ones.

    Args:
        scores: Of each module, [K] each.
        live: Which are left of each, boolean [K] each; what is gone does not come back.
        count: How many to keep; all where fewer are left.
        floor: How many each module keeps at least, as far as it has them; together no more than `count`.

    Returns:
        What is live now, of each module.
    """
    sizes = [len(score_K) for score_K in scores]
    ranked = torch.cat([one.double().masked_fill(~on, -1) for one, on in zip(scores, live, strict=True)])
    alive = torch.cat(list(live))
    start = 0
    for size in sizes if floor else ():
        top = ranked[start : start + size].argsort(descending=True, stable=True)[:floor] + start
        ranked[top[alive[top]]] = math.inf
        start += size
    chosen = ranked.argsort(descending=True, stable=True)[: min(count, int(alive.sum()))]
    found = torch.zeros_like(alive)
    found[chosen] = True
    return list(found.split(sizes))


def amount(asked: int | float, total: int) -> int:
    """A count, or a share of `total` and then at least 1; never more than `total`."""
    return min(total, asked if isinstance(asked, int) else max(1, round(asked * total)))
