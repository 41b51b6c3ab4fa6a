"""Ranks chosen by what training would gain: the fewest parameters that lose little of the first step's decrease.

To first order, a step of gradient descent of size eta on the factors of a set S of terms lowers the loss by

    eta sum_{k in S} G_k        G_k = |dL/dU_k|² + |dL/dV_k|² (+ (dL/dsigma_k)²)

so that leaving terms out makes the loss higher than with all candidates by the share 1 - sum_S G / sum_all G of the
decrease, at any eta. G is measured at the start, at a scale of 1, on calibration rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest

import torch
from torch import Tensor, nn

from peftcli.methods import gradients
from peftcli.methods.contract import Calibration
from peftcli.methods.gradients import Watched
from peftcli.methods.kpsvd import maths
from peftcli.methods.kpsvd.config import KpsvdConfig
from peftcli.methods.kpsvd.decomposition import Terms
from peftcli.methods.kpsvd.ranks import Cut
from peftcli.methods.kpsvd.start import Start, cost

OTHERS = (0.5, 0.2, 0.1, 0.05)
"""Bounds whose price is told beside the one that was asked for."""
NAMED = 3
"""Modules of the largest gain that are told."""


@dataclass(frozen=True)
class Gains:
    """What the candidates of every module would gain.

    Attributes:
        terms: G_k by module name.
        loss: Mean loss of the base on the calibration rows.
        batches: How many there were.
    """

    terms: dict[str, list[float]]
    loss: float
    batches: int


def measure(
    model: nn.Module,
    weights: Watched,
    found: Mapping[str, Terms],
    calibration: Calibration,
    batches: int,
    trained_sigma: bool,
) -> Gains:
    """The first-order gain of each candidate, from the gradients of the weights alone.

    With R(G) the rearranged gradient of a weight, dL/dU_k and dL/dV_k are R(G) vec(V_k) and R(G)ᵀ vec(U_k), times what
    else the parameters carry of sigma_k (`maths.gradients`). Both are linear in G, so that they are summed over the
    batches, and no gradient of a weight's size is kept.

    Args:
        model: The untouched base.
        weights: Of the targets, as `gradients.visit` takes them.
        found: Their candidates.
        calibration: The rows, and the loss.
        batches: Most batches to look at.
        trained_sigma: The singular values are trained beside the factors, not absorbed in them.

    Raises:
        CheckFailed: As `gradients.visit`.
    """
    sums = {name: (torch.zeros_like(terms.U), torch.zeros_like(terms.V)) for name, terms in found.items()}

    def add(name: str, G: Tensor) -> None:
        U_KMN, V_KPQ = found[name].U, found[name].V
        for total, part in zip(sums[name], maths.gradients(G.flatten(1).to(U_KMN.dtype), U_KMN, V_KPQ), strict=True):
            total += part

    loss, count = gradients.visit(model, weights, calibration, batches, add)
    return Gains(
        {name: _gains(dU / count, dV / count, found[name], trained_sigma) for name, (dU, dV) in sums.items()},
        loss,
        count,
    )


def _gains(dU_KMN: Tensor, dV_KPQ: Tensor, terms: Terms, trained_sigma: bool) -> list[float]:
    """G_k from R(G) vec(V_k) and R(G)ᵀ vec(U_k), for factors of norm 1 or that carry the root of sigma_k each."""
    sigma_K = terms.sigma.double()
    squares_K = dU_KMN.double().square().sum((1, 2)) + dV_KPQ.double().square().sum((1, 2))
    if trained_sigma:
        slope_K = (dU_KMN.double() * terms.U.double()).sum((1, 2))
        return (sigma_K.square() * squares_K + slope_K.square()).tolist()  # type: ignore[no-any-return]
    return (sigma_K * squares_K).tolist()  # type: ignore[no-any-return]


def choose(
    gains: Mapping[str, Sequence[float]], costs: Mapping[str, int], least: int, bound: float
) -> dict[str, list[int]]:
    """Which terms to keep: the best `least` of each module, then those of most gain per parameter over all modules.

    That is the cheapest choice where all terms cost the same, and else less than one term dearer than it. Ties go to
    the earlier module, then to the larger singular value.

    Args:
        gains: G_k by module name.
        costs: Trained parameters of a term of each module.
        least: Terms of every module.
        bound: Largest share of the gain of all candidates that may be lost.

    Returns:
        Places of the kept terms, rising, by module name.
    """
    wanted = (1 - bound) * sum(map(sum, gains.values()))
    kept = {name: nlargest(least, range(len(of)), key=of.__getitem__) for name, of in gains.items()}
    held = sum(gains[name][k] for name, places in kept.items() for k in places)
    offers = sorted(
        (-gain / costs[name], place, k, name)
        for place, (name, of) in enumerate(gains.items())
        for k, gain in enumerate(of)
        if k not in kept[name]
    )
    for *_, k, name in offers:
        if held >= wanted:
            break
        kept[name].append(k)
        held += gains[name][k]
    return {name: sorted(places) for name, places in kept.items()}


def cut(starts: Mapping[str, Start], gains: Gains, config: KpsvdConfig, bound: float) -> tuple[dict[str, Start], str]:
    """The starts with the terms that are worth it, and a sentence about what was chosen and why.

    Args:
        starts: With all candidates.
        gains: Of these.
        config: Its fewest terms of a module and kind of sigma.
        bound: See `choose`.
    """
    costs = {name: cost(config, found.terms.split) for name, found in starts.items()}
    chosen = choose(gains.terms, costs, config.min_rank, bound)
    after = {}
    for name, places in chosen.items():
        bounds = {config.min_rank: "min_rank", len(gains.terms[name]): "max_rank"}
        decided = Cut(len(places), bounds.get(len(places), "calibration"))  # type: ignore[arg-type]
        after[name] = Start(starts[name].terms, decided, tuple(places))
    return after, _told(gains, chosen, costs, config.min_rank, bound)


def _told(gains: Gains, chosen: Mapping[str, list[int]], costs: Mapping[str, int], least: int, bound: float) -> str:
    everything = sum(map(sum, gains.terms.values())) or 1.0
    held = {name: sum(gains.terms[name][k] for k in places) for name, places in chosen.items()}
    every = {name: list(range(len(of))) for name, of in gains.terms.items()}
    counts = [sum(map(len, places.values())) for places in (chosen, every)]
    spent = [_price(places, costs) for places in (chosen, every)]
    lost = 1 - sum(held.values()) / everything
    top = ", ".join(f"{name} {held[name] / everything:.0%}" for name in nlargest(NAMED, held, key=held.__getitem__))
    prices = ", ".join(
        f"{other:.0%} takes {_price(choose(gains.terms, costs, least, other), costs):,}" for other in OTHERS
    )
    return (
        f"chose {counts[0]:,} of {counts[1]:,} candidate terms, {spent[0]:,} of {spent[1]:,} parameters, by the "
        f"gradient on {gains.batches} calibration batches (loss {gains.loss:.4f}): a small step on them alone loses "
        f"{lost:.1%} of the decrease predicted with all, and {bound:.1%} may be lost ({prices} parameters); most of "
        f"the gain is in {top}"
    )


def _price(chosen: Mapping[str, list[int]], costs: Mapping[str, int]) -> int:
    return sum(costs[name] * len(places) for name, places in chosen.items())
