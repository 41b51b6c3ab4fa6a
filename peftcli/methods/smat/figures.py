"""What the report shows of SMAT: where experts act, what they share, how sparsity rose. M experts, K mask entries."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from peftcli.methods.smat import maths
from peftcli.methods.smat.model import SmatModel
from peftcli.models import roles
from peftcli.models.family import Family


def all_of(tuner: SmatModel, family: Family, path: list[list[float]], target: float) -> list[dict[str, Any]]:
    """The figures as `{"title", "x", "y", "labels"}` each.

    Args:
        tuner: The model.
        family: Names the roles of its layers.
        path: After each step, each expert's sparsity and that of all together.
        target: The sparsity asked for.
    """
    with torch.no_grad():
        masks_KM, counts_K = tuner.masks(), tuner.counts()
    found = [by_role(tuner, family, masks_KM, counts_K)]
    if deep := by_depth(tuner, family, masks_KM, counts_K):
        found.append(deep)
    if both := shared(masks_KM, counts_K):
        found.append(both)
    return [*found, course(path, target)] if path else found


def _density(tuner: SmatModel, masks_KM: Tensor, counts_K: Tensor, group: Any) -> dict[str, float]:
    """Mean share of non-zero weights over the experts, of the weights of each group."""
    layout = tuner.state.layouts[tuner._name]
    on_K = (masks_KM != 0).double().mean(1)
    changed: dict[str, float] = defaultdict(float)
    whole: dict[str, float] = defaultdict(float)
    places = torch.arange(len(counts_K)).split(layout.sizes)
    for name, place in zip(layout.masks, places, strict=True):
        if (label := group(name)) is None:
            continue
        changed[label] += float((on_K[place] * counts_K[place]).sum())
        whole[label] += float(counts_K[place].sum())
    return {label: changed[label] / whole[label] for label in whole}


def by_role(tuner: SmatModel, family: Family, masks_KM: Tensor, counts_K: Tensor) -> dict[str, Any]:
    """(a) Share of non-zero weights by kind of layer."""
    found = _density(tuner, masks_KM, counts_K, lambda name: roles.role_of(name, family) or "other")
    names = [*[role for role in family.roles if role in found], *(["other"] if "other" in found else [])]
    return {
        "title": "Weights that an expert changes, by layer",
        "x": names,
        "y": [[found[name] for name in names]],
        "labels": {"x": "layer", "y": "share, mean over experts"},
    }


def by_depth(tuner: SmatModel, family: Family, masks_KM: Tensor, counts_K: Tensor) -> dict[str, Any] | None:
    """(b) Share of non-zero weights by block, from the first to the last."""
    pattern = re.compile(rf"(?:^|\.)({family.blocks})\.") if family.blocks else None

    def block(name: str) -> str | None:
        found = pattern.search(name) if pattern else None
        return name[: found.end() - 1] if found else None

    found = _density(tuner, masks_KM, counts_K, block)
    if not found:
        return None
    return {
        "title": "Weights that an expert changes, by depth",
        "x": list(range(1, len(found) + 1)),
        "y": [list(found.values())],
        "labels": {"x": "block", "y": "share, mean over experts"},
    }


def shared(masks_KM: Tensor, counts_K: Tensor) -> dict[str, Any] | None:
    """(d) What two experts both change, over what either does (weights in both over weights in either)."""
    overlap_MM = maths.overlap(masks_KM, counts_K)
    names = [str(m + 1) for m in range(len(overlap_MM))]
    if len(names) == 1:
        return None
    others = overlap_MM[~torch.eye(len(names), dtype=torch.bool)]
    return {
        "title": "Overlap of the experts",
        "caption": f"Weights that both of two experts change over those that either does: {float(others.min()):.2f} to "
        f"{float(others.max()):.2f} between different ones; 0 would share nothing, 1 be the same expert twice.",
        "heat": [[round(float(v), 4) for v in row] for row in overlap_MM],
        "labels": {"x": "expert", "y": names, "columns": names},
    }


def course(path: list[list[float]], target: float) -> dict[str, Any]:
    """Sparsity after each step: of each expert, and what no expert changes."""
    experts = len(path[0]) - 1
    last = path[-1]
    return {
        "title": "Sparsity",
        "caption": "Share of the weights that stay the base's. At the end the densest expert leaves "
        f"{min(last[:-1]):.1%} of them, where {target:.1%} was asked for, and all together leave {last[-1]:.1%}.",
        "x": list(range(1, len(path) + 1)),
        "y": [*zip(*path, strict=True), [target] * len(path)],
        "labels": {"x": "step", "y": "share", "series": [*["each expert"] * experts, "all together", "target"]},
    }
