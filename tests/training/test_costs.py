"""The table of costs: counts by formula, the model as it was afterwards, what the page says of it.

Letters: as in peftcli/methods/sparse_adapter/layer.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftcli.methods.contract import Form
from peftcli.methods.sparse_adapter import compaction
from peftcli.reports import costs as shown
from peftcli.testing import tiny
from peftcli.testing.rows import Row, nudge
from peftcli.training import costs

R, MODULES, HEAD = 8, 4, tiny.WIDTH * tiny.LABELS + tiny.LABELS
LIVE = 3
CPU = torch.device("cpu")


def finished(gone: int = 0, **settings: Any) -> tuple[Any, Any, Any]:
    """A ViT whose modules have `LIVE` units each, but the first `gone`, which have none."""
    row = Row("sparse_adapter", {"r": R, "dropout": 0.0, **settings}, base=tiny.vit, dtype=torch.float32)
    base, method = row.new_base(), row.new_method()
    model: Any = method.attach(base.model, base.family)
    nudge(model)
    for place, (_, layer) in enumerate(list(compaction.layers(model, "default"))):
        if place < gone:
            layer.remove("default")
        else:
            layer.prune("default", {"units": torch.arange(R) < LIVE})
    method.finish(model)
    return base, model.eval(), method


@pytest.mark.parametrize("gone", [0, 1])
def test_counts_are_those_of_the_formulas_and_the_model_is_left_alone(gone: int) -> None:
    base, model, method = finished(gone)
    before, names = base.outputs(model), [name for name, _ in model.named_modules()]
    found = costs.measure(model, method.forms(model), costs.batches_of(base.batch), "fp32", CPU)
    assert torch.equal(base.outputs(model), before)
    assert [name for name, _ in model.named_modules()] == names
    rows = {row["form"]: row for row in found["rows"]}
    assert list(rows) == ["base", "dense", "masked", "compacted"]
    d, left = tiny.WIDTH, MODULES - gone
    whole = sum(p.numel() for p in tiny.vit().model.parameters())
    held = {name: row["parameters"] - whole for name, row in rows.items()}
    module = 2 * d * R + R + d + R  # with its gates
    small = 2 * d * LIVE + LIVE + d
    assert held == {"base": 0, "dense": MODULES * module, "masked": MODULES * module, "compacted": left * small}
    zero = {name: row["parameters"] - row["nonzero"] - (rows["base"]["parameters"] - rows["base"]["nonzero"])
            for name, row in rows.items()}  # fmt: skip
    assert zero["dense"] == zero["compacted"] == 0
    assert zero["masked"] == MODULES * module - left * (small + LIVE)
    flops = {name: row["flops"] - rows["base"]["flops"] for name, row in rows.items()}
    tokens = (tiny.PIXELS // 4) ** 2 + 1
    assert flops["dense"] == flops["masked"] == MODULES * 2 * 2 * d * R * tokens
    assert flops["compacted"] == left * 2 * 2 * d * LIVE * tokens
    assert rows["dense"]["memory"] == rows["masked"]["memory"]
    assert rows["base"]["memory"]["weights"] < rows["compacted"]["memory"]["weights"]
    assert rows["dense"]["memory"]["weights"] - rows["base"]["memory"]["weights"] == 4 * MODULES * module
    assert rows["base"]["file_bytes"] < rows["compacted"]["file_bytes"] < rows["dense"]["file_bytes"]
    for row in rows.values():
        assert set(row["latency"]) == {"1", "32"}
        assert all(one["median"] > 0 for one in row["latency"].values())


def test_the_files_size_is_that_of_the_file(tmp_path) -> None:
    base, model, method = finished()
    found = costs.measure(model, method.forms(model), costs.batches_of(base.batch), "fp32", CPU)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    save_file(saved, tmp_path / "again.safetensors")  # without the metadata of PEFT's file
    assert found["rows"][-1]["file_bytes"] == (tmp_path / "again.safetensors").stat().st_size


def test_masked_computes_what_compacted_does() -> None:
    base, model, method = finished(1)
    base_form, dense, masked, _ = method.forms(model)
    compacted = base.outputs(model)
    with costs.put(model, masked):
        torch.testing.assert_close(base.outputs(model), compacted, rtol=0, atol=1e-5)
    with costs.put(model, dense):
        assert not torch.allclose(base.outputs(model), compacted)
    with costs.put(model, base_form), model.disable_adapter():
        bare = base.outputs(model)
    assert torch.equal(bare, tiny.vit(torch.float32).outputs(tiny.vit(torch.float32).model))


@pytest.mark.parametrize("kind", [tiny.llama, tiny.mamba, tiny.resnet])
def test_every_family_has_a_table(kind: Any) -> None:
    architecture = "image-classification" if kind is tiny.resnet else "sequence-classification"
    row = Row("sparse_adapter", {"r": R}, base=kind, architecture=architecture, dtype=torch.float32)
    base, method = row.new_base(), row.new_method()
    model: Any = method.attach(base.model, base.family)
    nudge(model)
    method.finish(model)
    found = costs.measure(model, method.forms(model), costs.batches_of(base.batch), "bf16", CPU)
    table = shown.table(found)
    assert table is not None
    assert [len(cells) for _, cells in table.rows] == [len(table.columns)] * 4
    assert found["rows"][1]["flops"] > found["rows"][0]["flops"]


def test_a_batch_that_is_too_much_is_left_out_and_said(monkeypatch) -> None:
    base, model, method = finished()
    monkeypatch.setattr(costs, "LONGEST", 0.0)
    found = costs.measure(model, method.forms(model), costs.batches_of(base.batch), "fp32", CPU)
    assert found["left_out"] == [32]
    assert set(found["rows"][0]["latency"]) == {"1"}
    table = shown.table(found)
    assert table is not None
    assert "A batch of 32 would have taken too long" in table.caption


def test_what_is_trained_makes_no_form_larger():
    """Autocast keeps its casts of trained weights, and of no others."""
    base = tiny.vit(torch.float32)
    frozen = Form("frozen", {"vit": copy.deepcopy(base.model.vit).requires_grad_(False)})
    base.model.requires_grad_(True)
    batches = costs.batches_of(base.batch)
    found = costs.measure(base.model, [frozen, Form("trained", {})], batches, "bf16", torch.device("cpu"), 0.01)
    assert found["rows"][0]["memory"] == found["rows"][1]["memory"]
    assert all(p.requires_grad for p in base.model.parameters())
    assert not any(p.requires_grad for p in frozen.modules["vit"].parameters())
