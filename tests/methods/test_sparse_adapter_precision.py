"""Sparse adapters in low precision: what was pruned stays zero to the last bit, and skipped steps count for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peftcli.config.schema import OptimConfig
from peftcli.methods.sparse_adapter import compaction
from peftcli.methods.sparse_adapter.tuner import ADAPTER
from peftcli.testing import tiny
from peftcli.testing.rows import Row
from peftcli.training import optimiser as optimisers


@pytest.mark.parametrize("structure", ["unit", "weight"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pruned_weights_stay_zero_under_autocast(dtype: torch.dtype, structure: str) -> None:
    settings = {"r": 8, "guard": None, "structure": structure, "sparsity": 0.75}
    row = Row("sparse_adapter", settings, base=tiny.vit, dtype=torch.float32)
    base, method = row.new_base(), row.new_method()
    model: Any = method.attach(base.model, base.family)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, enabled=dtype is torch.float16)  # overflows at first
    skipped = masked = 0
    for stage in method.stages(30):
        assert stage.start is not None
        stage.start(model.train())
        built = optimisers.build(OptimConfig(lr=1e-2, weight_decay=0.1), model, method.parameter_groups(model))
        method.take_optimiser(model, built)
        for _ in range(stage.steps):
            with torch.autocast("cpu", dtype):
                loss = base.loss(model)
            scale = scaler.get_scale()
            scaler.scale(loss).backward()
            scaler.step(built)
            scaler.update()
            built.zero_grad()
            skipped += scaler.get_scale() < scale
            for _, layer in compaction.layers(model, ADAPTER):
                tensors = layer.tensors(ADAPTER)
                for kind, mask in layer.masks(ADAPTER).items():
                    gone = ~mask.expand_as(tensors[kind])
                    masked += int(gone.sum())
                    assert not tensors[kind][gone].any()
    assert masked
    assert (skipped > 0) == (dtype is torch.float16)
    method.finish(model)
    assert all(p.isfinite().all() for p in model.parameters())
