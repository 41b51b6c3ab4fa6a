"""The finished model in the forms that the report compares: base, dense, masked, compacted.

Letters: as in `layer`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peftcli.methods.contract import Form
from peftcli.methods.sparse_adapter import compaction
from peftcli.methods.sparse_adapter.layer import SparseAdapterLayer


def of(model: Any, adapter: str, names: Sequence[str], r: int, gate: bool) -> list[Form]:
    """The forms, on one base; the modules of the second and third are made anew.

    Args:
        model: A compacted PEFT model.
        adapter: Its adapter.
        names: Of all modules there were.
        r: Units that each had.
        gate: Each unit had a gate; compaction brings them into U.
    """
    base, now = model.get_base_model(), dict(compaction.layers(model, adapter))
    config = copy.copy(model.peft_config[adapter])
    config.r, config.units, config.gate = r, {}, gate
    dense: dict[str, Any] = {}
    masked: dict[str, Any] = {}
    for name in names:
        bare = now[name].base_layer if name in now else base.get_submodule(name)
        for found in (dense, masked):
            found[name] = layer = SparseAdapterLayer(bare)
            layer.update_layer(adapter, config, None)
            layer.eval().requires_grad_(False)
        for tensor in dense[name].tensors(adapter).values():
            nn.init.normal_(tensor)
        _scatter(now.get(name), masked[name], adapter)
    bare_modules = {name: layer.base_layer for name, layer in now.items()}
    return [Form("base", bare_modules), Form("dense", dense), Form("masked", masked), Form("compacted", {})]


@torch.no_grad()
def _scatter(small: SparseAdapterLayer | None, large: SparseAdapterLayer, adapter: str) -> None:
    """Give a whole module the values of a compacted one, and zeros where that has nothing."""
    tensors = large.tensors(adapter)
    for tensor in tensors.values():
        tensor.zero_()
    if small is None:
        return
    units = small.units[adapter]
    for kind, values in small.tensors(adapter).items():
        if kind == "up":
            tensors[kind][:, units] = values
        elif kind in ("down", "down_bias"):
            tensors[kind][units] = values
        else:
            tensors[kind].copy_(values)
    if "gate" in tensors:
        tensors["gate"][units] = 1
