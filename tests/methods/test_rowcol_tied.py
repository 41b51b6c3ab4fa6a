"""Tying a pretrained model: the best common matrix, exact where the maps were tied already, plain refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peftcli.config.errors import UserError
from peftcli.methods.rowcol import pairs
from peftcli.methods.rowcol.settings import Settings
from peftcli.methods.rowcol.tuner import Method
from peftcli.models.compact.registered import compacted
from peftcli.models.family import Family
from peftcli.testing import tiny
from peftcli.testing.contract import MethodContract
from peftcli.testing.rows import Row
from peftcli.training import costs

PICTURES = "image-classification"
TIE = {"mode": "tie"}
BASE = {"dtype": torch.float32, "architecture": PICTURES}


class TestContract(MethodContract):
    rows = (
        Row("rowcol", TIE, "tie-vit", base=tiny.vit, **BASE),
        Row("rowcol", {**TIE, "diagonal": True}, "tie-dinov2", base=tiny.dinov2, **BASE),
        Row("rowcol", TIE, "tie-llama", dtype=torch.float32),
        Row("rowcol", {**TIE, "targets": ["stage"]}, "tie-resnet", base=tiny.resnet, recomputes=False, **BASE),
        Row("rowcol", {**TIE, "layout": "halvit"}, "halvit", base=tiny.resnet, recomputes=False, **BASE),
    )


def attached(base: tiny.Base, **settings):
    method = Method(Settings(mode="tie", **settings))
    return method, method.attach(base.model, base.family)


def unit_scales(size: int, signs: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    scale = torch.rand(size, generator=generator) + 0.5
    return scale * torch.randn(size, generator=generator).sign() if signs else scale


@torch.no_grad()
def tie_by_hand(model: nn.Module, group: pairs.Group, scale: torch.Tensor | None = None) -> None:
    """Make a group's layers use one matrix, but for a factor of each unit."""
    source = model.get_submodule(group.source).weight
    for use in group.uses:
        weight = model.get_submodule(use.name).weight
        scaled = source if scale is None else source * scale.view(-1, *[1] * (source.dim() - 1)).to(source)
        weight.copy_(scaled.transpose(0, 1) if use.transposed else source)


@pytest.mark.parametrize(
    ("base", "targets", "scaled"),
    [
        (tiny.vit, ["attention", "mlp"], None),
        (tiny.dinov2, ["attention", "mlp"], None),
        (tiny.llama, ["mlp"], "sizes"),
        (tiny.resnet, ["conv"], "sizes"),
        (tiny.resnet, ["stage"], "sizes"),
    ],
)
def test_what_is_tied_already_stays_the_same_model(base, targets, scaled):
    base = base(torch.float32)
    groups, _ = pairs.find(base.model, base.family, targets)
    assert groups
    for group in groups:
        width = base.model.get_submodule(group.source).weight.shape[0]
        tie_by_hand(base.model, group, unit_scales(width, False) if scaled else None)
    expected = base.outputs(base.model)
    before = sum(p.numel() for p in base.model.parameters())
    method, model = attached(base, targets=targets)
    torch.testing.assert_close(base.outputs(model), expected, atol=2e-5, rtol=1e-4)
    saved = sum(model.get_submodule(g.source).weight.numel() * len(g.uses) for g in groups)
    assert before - sum(p.numel() for p in model.parameters()) == saved
    assert "differ from them by 0%" in method.notes[0]
    assert all(p.requires_grad != name.endswith("mask_token") for name, p in model.named_parameters())


def test_the_papers_identity_in_float64():
    base = tiny.vit()
    groups, _ = pairs.find(base.model, base.family, ["attention", "mlp"])
    for group in groups:
        tie_by_hand(base.model, group)
    expected, untied = base.outputs(base.model), copy.deepcopy(base.model).requires_grad_(True)
    base.loss(untied).backward()
    fillings = [pairs.fill(base.model, group, False) for group in groups]
    old = {name: base.model.get_submodule(name) for group in groups for name in group.names}
    uses = {use.name: group.source for group in groups for use in group.uses}
    tied = {"kind": "tied", "transposed": True, "diagonal": False}
    model = compacted(base.model, {name: {**tied, "to": to} for name, to in uses.items()})
    with torch.no_grad():
        for group, filling in zip(groups, fillings, strict=True):
            filling.put(model, group, old)
    torch.testing.assert_close(base.outputs(model), expected, atol=1e-12, rtol=0)
    base.loss(model.requires_grad_(True)).backward()
    for name, to in uses.items():
        both = untied.get_submodule(to).weight.grad + untied.get_submodule(name).weight.grad.T
        torch.testing.assert_close(model.get_submodule(to).weight.grad, both, atol=1e-12, rtol=0)


@pytest.mark.parametrize("base", [tiny.vit, tiny.resnet, tiny.llama])
def test_tying_saves_parameters_and_no_operation(base, monkeypatch):
    monkeypatch.setattr(costs, "SECONDS", 0.05)
    made, untouched = base(torch.float32), base(torch.float32).model
    method, model = attached(made)
    method.finish(model)
    before = made.outputs(model.eval())
    found = costs.measure(model, method.forms(model), costs.batches_of(made.batch), "fp32", torch.device("cpu"))
    assert torch.equal(made.outputs(model), before)
    original, tied = found["rows"]
    assert (original["form"], tied["form"]) == ("original", "tied")
    assert original["parameters"] == sum(p.numel() for p in untouched.parameters())
    assert tied["parameters"] == sum(p.numel() for p in model.parameters()) < original["parameters"]
    assert tied["memory"]["weights"] < original["memory"]["weights"]
    assert tied["flops"] == original["flops"]


def test_a_diagonal_brings_a_pretrained_model_nearer_to_itself():
    base = tiny.vit(torch.float32)
    groups, _ = pairs.find(base.model, base.family, ["mlp"])
    for group in groups:
        tie_by_hand(base.model, group, unit_scales(48, signs=True))
    expected, gaps = base.outputs(base.model), {}
    for diagonal in (False, True):
        other = tiny.vit(torch.float32)
        other.model.load_state_dict(base.model.state_dict())
        _, model = attached(other, targets=["mlp"], diagonal=diagonal)
        gaps[diagonal] = (base.outputs(model) - expected).abs().max().item()
    assert gaps[True] < 1e-5 < gaps[False]


def test_ordinary_maps_are_far_from_tied_and_the_report_shows_it():
    method, model = attached(tiny.vit(torch.float32))
    assert "attention: 4 maps use the matrices of 4 others, and differ from them by" in method.notes[0]
    (figure,) = method.figures(model)
    assert len(figure["y"][0]) == 6
    assert all(0.8 < error < 1.2 for error in figure["y"][0])


def test_blocks_that_change_their_width_are_left_out_and_listed():
    method, _ = attached(tiny.resnet(torch.float32))
    left_out = method.notes[-1]
    assert left_out.startswith("not tied: resnet.encoder.stages.0.layers.0.layer.2.convolution: 16 x 4 is not")
    assert method.notes[0].startswith("conv: 1 maps use")


def test_the_papers_layout_takes_the_shape_alone():
    torch.manual_seed(3)
    base = tiny.resnet(torch.float32)
    method, model = attached(base, layout="halvit")
    assert type(model).__name__ == "CompactResNetForImageClassification"
    assert model.resnet.encoder.stages[1].layers.grow.convolution.groups == 16
    assert "drawn anew" in method.notes[0]
    assert not torch.equal(model.classifier[1].weight, base.model.classifier[1].weight)
    assert model.config.num_labels == 3
    assert torch.isfinite(base.loss(model.train()))


def test_on_the_meta_device_it_has_the_same_shapes():
    for made, settings in ((tiny.vit, {}), (tiny.resnet, {"layout": "halvit"})):
        real = attached(made(torch.float32), **settings)[1]
        shadow = made(torch.float32)
        shadow.model.to("meta")
        counted = attached(shadow, **settings)[1]
        assert {n: p.shape for n, p in counted.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}


class Fused(nn.Module):
    """An attention of one projection."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)


def test_what_cannot_be_tied_is_said():
    with pytest.raises(
        UserError, match=r"q_proj is 32 x 32 and .*o_proj 32 x 32|k_proj is 16 x 32 and .*v_proj 16 x 32"
    ):
        attached(tiny.llama(), targets=["attention"])
    with pytest.raises(UserError, match=r"nothing of this model can be tied \(mamba\)"):
        attached(tiny.mamba())
    with pytest.raises(UserError, match=r"fused into one matrix, as qkv"):
        Method(Settings(mode="tie", targets=["attention"])).attach(Fused(), Family("fused", ()))
    with pytest.raises(UserError, match=r"can be tied \(attention\)\s+what it has: conv, stage"):
        attached(tiny.resnet(), targets=["attention"])
    with pytest.raises(UserError, match="unknown part to tie 'attn'"):
        attached(tiny.vit(), targets=["attn"])
    with pytest.raises(UserError, match="the base is a vit"):
        attached(tiny.vit(), layout="halvit")
