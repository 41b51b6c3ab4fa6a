"""Smaller dense modules that compute the same: dead units go, constant ones become a bias, empty modules vanish.

Exact up to rounding. A unit is dead where its column of U or its gate is zero; it is constant where its row of D is
zero: gate * f(b) is the same number everywhere, and U brings it into the bias c once and for all.

Letters: as in `layer`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from peftcli.methods.sparse_adapter.layer import ACTIVATIONS, SparseAdapterLayer


def layers(model: Any, adapter: str) -> Iterator[tuple[str, SparseAdapterLayer]]:
    """The modules that an adapter has, by the names that what they wrap has in the base."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name, module in base.named_modules():
        if isinstance(module, SparseAdapterLayer) and adapter in module.units:
            yield name, module


def compact(model: Any, adapter: str = "default") -> None:
    """Make every module of an adapter as small as what it computes, in place, and note it in the configuration.

    Args:
        model: A PEFT model; its adapter may go on being trained, with smaller tensors in place of the former ones.
        adapter: Its name.
    """
    found = list(layers(model, adapter))
    for _, layer in found:
        shrink(layer, adapter)
    note(model, adapter)


@torch.no_grad()
def shrink(layer: SparseAdapterLayer, adapter: str) -> None:
    """One module; where nothing is left of it, the adapter leaves the layer."""
    D_RI, b_R, U_ER, c_E = layer.effective(adapter)
    reads_R, writes_R = D_RI.ne(0).any(1), U_ER.ne(0).any(0)
    if c_E is not None and b_R is not None:
        constant_R = ACTIVATIONS[layer.configs[adapter].activation](b_R) * (writes_R & ~reads_R)
        c_E = c_E + U_ER @ constant_R
        layer.sparse_up_bias[adapter].copy_(c_E)
    keep = (reads_R & writes_R).nonzero().flatten()
    if len(keep) and (index := layer.live("index", adapter)) is not None:
        keep = index[keep]
    if not len(keep) and (c_E is None or not c_E.any()):
        layer.remove(adapter)
    elif len(keep) < len(layer.units[adapter]):
        layer.resize(adapter, keep.tolist())
        if not len(keep):
            layer.revive(adapter)  # the bias is all there is, and no mask of units speaks for it


@torch.no_grad()
def fold_gates(model: Any, adapter: str) -> None:
    """Bring the gates into U, for good: training is over, and a product less is computed and saved."""
    for _, layer in layers(model, adapter):
        if adapter in layer.sparse_gate:
            layer.sparse_up[adapter].mul_(layer.sparse_gate.pop(adapter))
    model.peft_config[adapter].gate = False


def note(model: Any, adapter: str) -> None:
    """Write into the configuration which modules there are and which units they have: what the file's loader reads."""
    config = model.peft_config[adapter]
    config.units = {name: list(layer.units[adapter]) for name, layer in layers(model, adapter)}
    config.target_modules = sorted(config.units)


def unwrap(model: Any) -> None:
    """Put the base's own modules back where no adapter is left."""
    base: nn.Module = model.get_base_model()
    for name, module in list(base.named_modules()):
        if isinstance(module, SparseAdapterLayer) and not module.units:
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, module.base_layer)


def survivors(layer: SparseAdapterLayer, adapter: str) -> tuple[int, int]:
    """Units that a module has, and non-zero numbers among its D and U with what is pruned left out."""
    D_RI, _, U_ER, _ = layer.effective(adapter)
    return int((D_RI.ne(0).any(1) & U_ER.ne(0).any(0)).sum()), int(D_RI.count_nonzero() + U_ER.count_nonzero())


def size_of(model: Any, adapter: str) -> int:
    """Numbers that an adapter's modules hold."""
    return sum(t.numel() for _, layer in layers(model, adapter) for t in layer.tensors(adapter).values())


def fix(layer: SparseAdapterLayer, adapter: str) -> None:
    """Let the weights that are zero now stay zero, whatever is trained; the others are live."""
    live = {kind: layer.of(kind)[adapter].detach().ne(0) for kind in ("down", "up")}
    layer.revive(adapter)
    if not all(bool(mask.all()) for mask in live.values()):
        layer.prune(adapter, live)
