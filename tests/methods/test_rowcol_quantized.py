"""Cores on a base in few bits: bases of its numbers, nothing of it moves, files fit the packed and the whole base."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peftcli.artifacts import merge
from peftcli.config.errors import UserError
from peftcli.methods.peft_types import register
from peftcli.methods.rowcol.layer import RowcolLayer
from peftcli.methods.rowcol.tuner import PEFT_TYPE
from peftcli.models import packed, quantized
from peftcli.testing.rows import nudge, trained
from peftcli.training import checks
from tests.methods.test_kpsvd_quantized import IDS, assert_file_fits, attach, load, step

register(PEFT_TYPE)
SETTINGS = [
    {"rank": 4}, {"rank": 4, "basis": "weight", "alpha": 8.0}, {"rank": 4, "basis": "gradient"},
    {"rank": "auto", "energy": 0.4, "targets": ["mlp"]},
]  # fmt: skip


@pytest.fixture(params=["nf4", "int8"])
def kind(request) -> str:
    pytest.importorskip("bitsandbytes")
    return request.param


def layers(model: Any) -> list[RowcolLayer]:
    return [module for module in model.modules() if isinstance(module, RowcolLayer)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_it_starts_as_the_packed_base_and_only_the_cores_move(kind, settings, precision):
    loaded = load(kind, precision=precision)
    with torch.no_grad():
        before = loaded.model.eval()(input_ids=IDS).logits
    model, method = attach(loaded, "rowcol", **settings)
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert all("rowcol_R" in name for name in trained(model))
    frozen = {name: value for name, value in checks.fingerprints(model).items() if "rowcol_R" not in name}
    step(model, method)
    assert all(p.grad.any() for p in trained(model).values())
    now = checks.fingerprints(model)
    assert frozen == {name: now[name] for name in frozen}
    assert not torch.equal(model(input_ids=IDS).logits, before)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, before)


def test_its_bases_are_those_of_the_unpacked_weight(kind):
    whole = load(kind)
    quantized.unpack(whole.model)
    found, expected = (attach(loaded, "rowcol", rank=4, basis="weight")[0] for loaded in (load(kind), whole))
    for ours, theirs in zip(layers(found), layers(expected), strict=True):
        for basis in ("rowcol_U", "rowcol_V"):
            pair = (getattr(layer, basis)["default"] for layer in (ours, theirs))
            torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-3)
    nudge(found)
    with pytest.raises(UserError, match="few bits without rounding it again"):
        found.merge_adapter()


def test_a_file_fits_the_packed_and_the_whole_base(kind, tmp_path):
    assert_file_fits(attach(load(kind), "rowcol", rank=4)[0], kind, tmp_path)


def test_it_merges_into_the_whole_base(kind):
    model, _ = attach(load(kind), "rowcol", rank=4)
    nudge(model)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        merged = merge.merged_in_float32(merge.on_whole_base(model))
        found = merged(input_ids=IDS).logits
    assert packed.kind(merged) is None
    assert (found - expected).norm() < 1e-3 * expected.norm()
