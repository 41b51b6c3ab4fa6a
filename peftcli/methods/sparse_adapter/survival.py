"""What pruning has left: counts, a sentence for the user, figures for the report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from peftcli.methods.sparse_adapter import compaction
from peftcli.methods.sparse_adapter.layer import SparseAdapterLayer


@dataclass(frozen=True)
class Count:
    """Of all modules together.

    Attributes:
        modules: With anything left.
        units: That read something and write something.
        all_units: Held in memory.
        weights: Non-zero ones in D and U.
        all_weights: Held in memory.
    """

    modules: int
    units: int
    all_units: int
    weights: int
    all_weights: int


def count(model: Any, adapter: str) -> Count:
    """What an adapter's modules have now."""
    found = [(layer, *compaction.survivors(layer, adapter)) for _, layer in compaction.layers(model, adapter)]
    return Count(
        sum(weights > 0 for _, _, weights in found),
        sum(units for _, units, _ in found),
        sum(len(layer.units[adapter]) for layer, _, _ in found),
        sum(weights for _, _, weights in found),
        sum(layer.sparse_down[adapter].numel() + layer.sparse_up[adapter].numel() for layer, _, _ in found),
    )


def sparsity(layers: Iterable[SparseAdapterLayer], adapter: str, structure: str) -> float:
    """The share of an adapter's units or weights that is zero."""
    left = held = 0
    for layer in layers:
        units, weights = compaction.survivors(layer, adapter)
        left += units if structure == "unit" else weights
        matrices = (layer.sparse_down[adapter], layer.sparse_up[adapter])
        held += len(layer.units[adapter]) if structure == "unit" else sum(m.numel() for m in matrices)
    return 1 - left / max(1, held)


def sentence(model: Any, adapter: str, before: Count, names: Sequence[str], r: int) -> str:
    """What is left of what there was, in words."""
    now = count(model, adapter)
    return (
        f"{now.units:,} of {len(names) * r:,} units are left, in {now.modules} of {len(names)} modules; of "
        f"{before.all_weights:,} weights {now.weights:,} are not zero, and {now.all_weights:,} are held"
    )


def figures(
    model: Any, adapter: str, names: Sequence[str], path: Sequence[tuple[float, float, float]], r: int, dense: int
) -> list[dict[str, Any]]:
    """Units and weights of each module, those that vanished too, all of them together, and sparsity over the steps.

    Args:
        model: The PEFT model.
        adapter: Its adapter.
        names: Of all modules there were.
        path: Step, asked and measured sparsity, each time that it was changed.
        r: Units that each module had.
        dense: Numbers that all modules had together.
    """
    held = compaction.size_of(model, adapter)
    nonzero = held - sum(
        int((tensor == 0).sum())
        for _, layer in compaction.layers(model, adapter)
        for tensor in layer.tensors(adapter).values()
    )
    left = {name: compaction.survivors(layer, adapter) for name, layer in compaction.layers(model, adapter)}
    shown: list[dict[str, Any]] = [
        {
            "title": "Units left in each module",
            "x": list(names),
            "y": [left.get(name, (0, 0))[0] for name in names],
            "labels": {"y": f"units of {r}"},
        },
        {
            "title": "Weights left in each module",
            "x": list(names),
            "y": [left.get(name, (0, 0))[1] for name in names],
            "labels": {"y": "weights that are not zero"},
        },
        {
            "title": "Numbers of all modules",
            "caption": "Masked tensors hold their zeros and cost what dense ones cost: only what compaction drops is "
            "saved in memory, arithmetic and time.",
            "x": ["dense", "masked", "compacted"],
            "y": [[dense, dense, held], [dense, nonzero, nonzero]],
            "labels": {"y": "numbers", "series": ["held", "not zero"]},
        },
    ]
    if path:
        steps, asked, zeros = (list(column) for column in zip(*path, strict=True))
        labels = {"x": "step", "y": "share that is zero", "series": ["asked for", "measured"]}
        shown.append({"title": "Sparsity", "x": steps, "y": [asked, zeros], "labels": labels})
    return shown
