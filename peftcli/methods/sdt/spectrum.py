"""What the report shows of a selection: how the scores fall off, and where the chosen channels are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

POINTS = 64
"""Points of a curve and columns of a heat map at most."""
CURVES = 6


def summary(sizes: Sequence[Sequence[int]], D: int, N: int, scores: Mapping[str, Tensor]) -> str:
    """How many channels and states were chosen, and how much of the score the best of them hold."""
    channels, states, pruned = ([size[i] for size in sizes] for i in range(3))
    text = f"{_span(channels)} of {D} channels and {_span(states)} of {N} states in each of {len(sizes)} layers"
    if any(pruned):
        text += f", {_span(pruned)} channels pruned"
    if scores:
        held = [_held(score_D, K) for score_D, K in zip(scores.values(), channels, strict=False)]
        text += f"; the chosen channels hold {min(held):.0%} to {max(held):.0%} of a layer's score"
    return text


def _span(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(set(numbers)) == 1 else f"{min(numbers)} to {max(numbers)}"


def _held(score_D: Tensor, K: int) -> float:
    return float(score_D.sort(descending=True).values[:K].sum() / score_D.sum())


def figures(scores: Mapping[str, Tensor], chosen: Mapping[str, Tensor], D: int) -> list[dict[str, Any]]:
    """Figures of the report.

    Args:
        scores: Of the channels [D], by block.
        chosen: Indices of the chosen channels, by block.
        D: Channels of a block.
    """
    found = []
    if scores:
        at = sorted({round(i * (D - 1) / (POINTS - 1)) for i in range(POINTS)})
        names = list(scores)[:: max(1, len(scores) // CURVES)]
        curves = [(scores[name].sort(descending=True).values / scores[name].sum())[at].tolist() for name in names]
        labels = {"x": "channels, best first", "y": "share of the layer's score", "series": [_short(n) for n in names]}
        found.append(
            {"title": "Selection scores of the channels", "x": [i + 1 for i in at], "y": curves, "labels": labels}
        )
    if chosen:
        columns = min(POINTS, D)
        heat = [
            torch.bincount(channels_K.cpu().long() * columns // D, minlength=columns).tolist()
            for channels_K in chosen.values()
        ]
        labels = {"x": f"channels 1 to {D}", "y": [_short(name) for name in chosen], "value": "chosen channels"}
        found.append({"title": "Chosen channels by layer", "heat": heat, "labels": labels})
    return found


def _short(name: str) -> str:
    numbers = [part for part in name.split(".") if part.isdigit()]
    return f"layer {numbers[0]}" if numbers else name
