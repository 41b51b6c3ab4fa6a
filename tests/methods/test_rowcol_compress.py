"""Compressing: what each way keeps is what it says, targets hold, nothing grows, mistakes are plain."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from peftcli.config.errors import UserError
from peftcli.methods.contract import Calibration
from peftcli.methods.rowcol import costing, moments, planning
from peftcli.methods.rowcol.rebuilding import Heads, Matrix, Window
from peftcli.methods.rowcol.settings import Settings
from peftcli.methods.rowcol.tuner import Method
from peftcli.models.compact.layers import Factored
from peftcli.models.compact.registered import compacted
from peftcli.models.family import Family
from peftcli.testing import tiny
from peftcli.training.found import FoundFolder

PLAIN = Family("plain", ())
EXACT = {"atol": 1e-9, "rtol": 0}


class Small(nn.Module):
    """A layer as a whole model."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def looked(layer: nn.Module, x: torch.Tensor | None):
    """What can be made of a layer, after it has seen x, and the moment of x."""
    model = Small(layer)
    kind = Window if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1) else Matrix
    thing, moment = kind("layer", layer), None
    if x is not None:
        calibration = Calibration([[{"x": x}]], lambda m, batch: m(**batch), 1, 1)
        [(_, moment)] = moments.visit(model, {"layer": layer}, calibration, 1)
    thing.look(moment)
    return thing, moment


def rebuilt(layer: nn.Module, thing, ranks, moment) -> nn.Module:
    model = Small(copy.deepcopy(layer))
    model.config = tiny.vit_shape()  # any: a compact model lists its parts there
    from peftcli.models.compact.parts import build

    build(model, {"layer": thing.part(ranks)})
    model.layer.load_state_dict(thing.tensors(ranks, moment))
    return model.layer


LAYERS = {
    "linear": (lambda: nn.Linear(20, 30), (64, 20)),
    "linear without bias": (lambda: nn.Linear(20, 12, bias=False), (64, 20)),
    "1x1 with stride": (lambda: nn.Conv2d(12, 20, 1, stride=2, bias=False), (8, 12, 7, 7)),
    "3x3": (lambda: nn.Conv2d(8, 12, 3, padding=1), (8, 8, 7, 7)),
    "3x3 with stride and dilation": (lambda: nn.Conv2d(8, 6, 3, 2, 2, 2, bias=False), (8, 8, 9, 9)),
}


def drawn(kind: str) -> tuple[nn.Module, torch.Tensor]:
    """A layer, and inputs that are of unequal size in their directions and not centred."""
    torch.manual_seed(len(kind))
    make, shape = LAYERS[kind]
    layer = make().double()
    mixing = torch.randn(shape[1], shape[1], dtype=torch.float64) * 0.5 ** torch.arange(shape[1])
    x = torch.einsum("bi...,oi->bo...", torch.randn(shape, dtype=torch.float64), mixing) + 0.3
    return layer, x


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("data", [True, False])
def test_a_way_keeps_what_it_says(kind, data):
    layer, x = drawn(kind)
    thing, moment = looked(layer, x if data else None)
    assert len({len(way.ranks) for way in thing.ways}) == (2 if "3x3" in kind else 1)
    y = layer(x).movedim(1, -1).flatten(0, -2)
    for way in thing.ways[:: max(1, len(thing.ways) // 9)]:
        assert thing.parameters(way.ranks) < thing.parameters(())
        smaller = rebuilt(layer, thing, way.ranks, moment)
        held = sum(p.numel() for p in smaller.parameters()) - (0 if layer.bias is None else layer.bias.numel())
        assert held == thing.parameters(way.ranks)
        if data:
            lost = (smaller(x).movedim(1, -1).flatten(0, -2) - y).square().sum()
            whole = (y - (0 if layer.bias is None else y.mean(0))).square().sum()
            assert way.kept == pytest.approx(1 - (lost / whole).item(), abs=1e-7)
        else:
            product = layer.weight.new_zeros(0)
            eye = torch.eye(layer.weight[0].numel(), dtype=torch.float64).view(-1, *layer.weight.shape[1:])
            plain = copy.deepcopy(smaller)
            if isinstance(layer, nn.Conv2d):  # the kernel itself: each unit patch, without stride, padding or dilation
                for one in plain:
                    one.stride, one.padding, one.dilation = (1, 1), (0, 0), (1, 1)
            product = plain(eye).flatten(1).mT - (0 if layer.bias is None else layer.bias[:, None])
            lost = (product - layer.weight.flatten(1)).square().sum() / layer.weight.square().sum()
            assert way.kept == pytest.approx(1 - lost.item(), abs=1e-7)


@pytest.mark.parametrize("kind", LAYERS)
def test_data_are_worth_more_than_weights_alone(kind):
    layer, x = drawn(kind)
    by_data, moment = looked(layer, x)
    by_weight, _ = looked(layer, None)
    y = layer(x)
    for ranks in [way.ranks for way in by_data.ways][:: max(1, len(by_data.ways) // 6)]:
        errors = [
            (rebuilt(layer, thing, ranks, seen)(x) - y).norm() for thing, seen in ((by_data, moment), (by_weight, None))
        ]
        assert errors[0] <= errors[1] * (1 + 1e-9)


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if "3x3" not in kind])
def test_inputs_of_few_directions_need_no_more(kind):
    layer, x = drawn(kind)
    torch.manual_seed(3)
    basis = torch.linalg.qr(torch.randn(x.shape[1], 4, dtype=torch.float64))[0]
    x = torch.einsum("bk...,ik->bi...", x[:, :4], basis)
    thing, moment = looked(layer, x)
    torch.testing.assert_close(rebuilt(layer, thing, (4,), moment)(x), layer(x), atol=1e-6, rtol=1e-6)
    assert thing.usage.row_rank <= 4


def test_channels_that_carry_nothing_go_from_tucker():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(8, 12, 3, padding=1).double(), torch.randn(6, 8, 7, 7, dtype=torch.float64)
    with torch.no_grad():
        layer.weight[6:] = layer.weight[:6]  # six directions of outputs
    layer.bias = None
    x[:, 4:] = x[:, :4] @ torch.randn(7, 7, dtype=torch.float64) * 0 + x[:, :4]  # four of inputs
    thing, moment = looked(layer, x)
    way = next(way for way in thing.ways if way.ranks == (4, 6))
    assert way.kept == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(rebuilt(layer, thing, (4, 6), moment)(x), layer(x), atol=1e-5, rtol=1e-5)


def attach(base, found=None, calibration=True, **settings):
    method = Method(Settings(mode="compress", **{"target": {"parameters": "60%"}, **settings}))
    rows = Calibration([[base.batch]], lambda model, _: base.loss(model), 1, 1, found)
    return method, method.attach(base.model, base.family, rows if calibration else None)


BASES = {"vit": tiny.vit, "dinov2": tiny.dinov2, "resnet": tiny.resnet, "llama": tiny.llama, "mamba": tiny.mamba}


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("target", [{"parameters": "60%"}, {"parameters": "0.45"}, {"flops": "60%"}])
def test_a_target_holds(kind, target):
    basis = "weight" if kind in ("llama", "mamba") else "data"  # a dozen positions show too little
    base, untouched = BASES[kind](torch.float32), BASES[kind](torch.float32)
    method, model = attach(base, target=target, basis=basis)
    ((unit, said),) = target.items()
    share = float(said.strip("%")) / (100 if "%" in said else 1)
    before, after = (counted(one, base, unit) for one in (untouched.model, model))
    assert after <= share * before + 1e-9
    assert after > 0.6 * share * before  # and what may be used is used
    if kind != "mamba":  # whose tiny base brings hooks of its own
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert [form.name for form in method.forms(model)] == ["original", "compressed"]
    for name, part in model.config.parts.items():
        if part["kind"] == "factors" and len(part["ranks"]) == 1:
            weight = untouched.model.get_submodule(name).weight
            assert part["ranks"][0] * (len(weight) + weight[0].numel()) < weight.numel()
    assert torch.isfinite(base.loss(model))


def counted(model, base, unit) -> float:
    if unit == "parameters":
        return costing.backbone(model, base.family)
    outside = ("patch_embeddings.projection", "embedder.embedder.convolution", "classifier", "lm_head")
    names = [name for name, _ in model.named_modules() if name.endswith(outside)]
    with FlopCounterMode(display=False) as counter:
        model(**{name: tensor[:1] for name, tensor in base.batch.items()})
    apart = sum(sum(counter.get_flop_counts()[f"{type(model).__name__}.{name}"].values()) for name in names)
    return counter.get_total_flops() - apart


def test_more_room_never_makes_a_layer_smaller():
    sizes = []
    for share in ("35%", "50%", "75%", "75%"):
        base = tiny.vit(torch.float32)
        _, model = attach(base, target={"parameters": share})
        sizes.append({name: sum(p.numel() for p in m.parameters()) for name, m in blocks(model)})
    assert sizes[2] == sizes[3]
    for smaller, larger in ((sizes[0], sizes[1]), (sizes[1], sizes[2])):
        assert all(smaller[name] <= larger[name] for name in smaller)


def blocks(model):
    return [(n, m) for n, m in model.named_modules() if n.endswith(("attention", "fc1", "fc2"))]


def test_heads_are_cut_in_pairs_as_one_function():
    base = tiny.vit()
    name = "vit.layers.0.attention"
    module = base.model.get_submodule(name)
    for one in (module.q_proj, module.k_proj, module.v_proj, module.o_proj):
        nn.init.normal_(one.bias, generator=torch.Generator().manual_seed(one.weight.numel()))
    thing = Heads(name, module)
    rows = Calibration([[base.batch]], lambda model, _: base.loss(model), 1, 1)
    [(_, moment)] = moments.visit(base.model, {thing.source: thing.layer}, rows, 1)
    thing.look(moment)
    padded = copy.deepcopy(base.model)
    other = Heads(name, padded.get_submodule(name))
    other.look(moment)
    with torch.no_grad():
        for parameter, value in other.cut((5,)):
            parameter.copy_(value)
    tensors, before = thing.tensors((5,), moment), sum(p.numel() for p in module.parameters())
    assert before == thing.parameters(())
    model = compacted(base.model, {name: thing.part((5,))})
    model.get_submodule(name).load_state_dict(tensors)
    assert sum(p.numel() for p in module.parameters()) == thing.parameters((5,))
    torch.testing.assert_close(base.outputs(model), base.outputs(padded), **EXACT)


def test_sensitive_layers_get_more():
    base = tiny.vit(torch.float32)
    with torch.no_grad():  # what the second block makes of its middle counts for hardly anything
        base.model.vit.layers[1].mlp.fc2.weight.mul_(1e-3)
    names = {"worth": "sensitivity", "targets": ["mlp"]}
    by_energy = attach(tiny_copy(base), target={"parameters": "75%"}, targets=["mlp"])[1]
    by_loss = attach(base, target={"parameters": "75%"}, **names)[1]
    size = lambda model, place: sum(p.numel() for p in model.vit.layers[place].mlp.parameters())  # noqa: E731
    assert size(by_loss, 1) < size(by_energy, 1)
    assert size(by_loss, 0) > size(by_energy, 0)


def tiny_copy(base):
    return tiny.Base(copy.deepcopy(base.model), base.family, base.batch, base.targets)


def test_pruned_zeros_stay_out_of_the_bases():
    base = tiny.vit(torch.float32)
    layer = base.model.vit.layers[0].mlp.fc1
    with torch.no_grad():  # the smallest weights of the model are all of some rows and columns
        layer.weight[40:] *= 1e-8
        layer.weight[:, 30:] *= 1e-8
    small = layer.weight[40:].numel() + layer.weight[:40, 30:].numel()
    whole = sum(m.weight.numel() for n, m in base.model.named_modules() if n.endswith(("_proj", ".fc1", ".fc2")) and n)
    method, model = attach(base, prune=small / whole, target={"parameters": "55%"})
    assert "weights are zero before anything is looked at" in method.notes[0]
    factored = model.vit.layers[0].mlp.fc1
    assert isinstance(factored, Factored)
    assert not factored.expand.weight[40:].any()
    assert not factored.reduce.weight[:, 30:].any()
    assert factored.expand.weight[:40].any(dim=1).all()
    assert method._original.vit.layers[0].mlp.fc1.weight[40:].any()  # the teacher is as it was


def test_latency_is_measured_and_goes_down():
    torch.manual_seed(0)
    base = tiny.vit(torch.float32)
    from transformers import ViTForImageClassification

    shape = tiny.vit_shape(hidden_size=192, intermediate_size=768, image_size=48, num_labels=3)
    model = ViTForImageClassification(shape).requires_grad_(False).eval()
    batch = {"pixel_values": torch.randn(8, 3, 48, 48)}
    things, _ = planning.find(model, base.family, [])
    for thing in things:
        thing.look(None)
    cost = costing.Latency(model, things, batch)
    assert len(cost.table) == 3  # two blocks of three shapes
    for thing in things:
        times = [cost.of(thing, way.ranks) for way in thing.ways]
        assert times == sorted(times)
        assert 0 < times[0] < cost.of(thing, ())
    plan = planning.plan(things, cost, 0.85)
    assert plan.cost <= 0.85 * cost.whole
    assert any(plan.chosen.values())
    json.dumps(cost.table)


def test_what_was_found_once_is_found_again(tmp_path: Path):
    found = FoundFolder(tmp_path / "start")
    base = tiny.vit(torch.float32)
    method, model = attach(base, found, prune=0.1)
    again, other = attach(tiny.vit(torch.float32), found, calibration=True, target={"parameters": "99%"})
    assert model.config.parts == other.config.parts  # not looked at again
    assert method.notes == again.notes
    assert method.figures(model) == again.figures(other)
    for (name, tensor), (_, same) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(tensor, same), name
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    moved = base.outputs(model)
    with method.at_start(model) as start:
        assert torch.equal(base.outputs(start), base.outputs(other))
    assert torch.equal(base.outputs(model), moved)


def test_on_the_meta_device_the_target_holds_too():
    for made in (tiny.vit, tiny.resnet, tiny.llama):
        base = made(torch.float32)
        before = costing.backbone(base.model, base.family)
        base.model.to("meta")
        method, model = attach(base, calibration=False, target={"flops": "50%"})
        assert 0.4 * before < costing.backbone(model, base.family) <= 0.5 * before
        assert "as if it were of parameters" in method.notes[0]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({"parameters": "150%"}, "is 150%, expected a share of what there is: above 0 and below 100%"),
        ({"parameters": "100%"}, "above 0 and below 100%"),
        ({"parameters": "half"}, "is half, expected a share"),
        ({"flops": "-5%"}, "is -5%, expected a share"),
        ({"parameter": "50%"}, "unknown target 'parameter'(.|\n)*parameters"),
        ({"parameters": "50%", "flops": "50%"}, "has 2 targets, expected one"),
        ({}, "method.target is missing"),
        ({"parameters": "1%"}, r"stay as they are, and the smallest ranks of the rest make it 1\d\.\d%"),
    ],
)
def test_a_mistaken_target(target, said):
    with pytest.raises(UserError, match=said):
        attach(tiny.vit(torch.float32), target=target)


def test_too_few_rows_are_said():
    with pytest.raises(UserError, match="may get up to 15 directions, and the calibration rows have 12 positions"):
        attach(tiny.llama(torch.float32))
    with pytest.raises(UserError, match="looks at a calibration set, and there is none"):
        attach(tiny.vit(torch.float32), calibration=False)


class Odd(nn.Module):
    """Layers that stay as they are beside one that does not."""

    def __init__(self):
        super().__init__()
        self.qkv_proj = nn.Linear(16, 48)
        self.attention = nn.MultiheadAttention(16, 4)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.grouped = nn.Conv2d(16, 16, 3, groups=4)
        self.reflected = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")
        self.tiny = nn.Linear(2, 1)
        self.up = nn.Linear(16, 32)


def test_what_cannot_be_rebuilt_is_listed():
    things, left_out = planning.find(Odd(), PLAIN, [])
    assert [thing.name for thing in things] == ["up"]
    assert left_out == {
        "qkv_proj": "several projections are fused in it",
        "attention": "several projections are fused in it",
        "depthwise": "each channel has its own filter",
        "grouped": "its channels are in groups",
        "reflected": "it pads by 'reflect'",
    }
    with pytest.raises(UserError, match="no layer of this model can be rebuilt smaller; grouped: its channels"):
        planning.find(Odd(), PLAIN, ["grouped"])


def test_the_note_lists_what_was_left_out():
    method, _ = attach(tiny.mamba(torch.float32), basis="weight")
    assert any("mixer.conv1d: each channel has its own filter" in note for note in method.notes)


def test_a_source_of_tied_weights_stays():
    base = tiny.vit(torch.float32)
    tie = {"kind": "tied", "to": "vit.layers.0.mlp.fc1", "transposed": True, "diagonal": False}
    model = compacted(base.model, {"vit.layers.0.mlp.fc2": tie})
    things, left_out = planning.find(model, base.family, ["mlp.up", "attention"])
    assert left_out == {"vit.layers.0.mlp.fc1": "another layer uses its weight"}
    assert "vit.layers.1.mlp.fc1" in {thing.name for thing in things}
