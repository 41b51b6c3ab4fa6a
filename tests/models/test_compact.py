"""Compact models: rebuilt parts compute what their tensors say, are saved whole, and read back by Transformers."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, ViTConfig, ViTForImageClassification
from transformers.models.resnet.modeling_resnet import ResNetConfig, ResNetForImageClassification

import peftcli
from peftcli.config.errors import UserError
from peftcli.config.schema import ModelConfig
from peftcli.methods.lora.settings import Settings as Lora
from peftcli.methods.lora.tuner import Method as LoraMethod
from peftcli.methods.rowcol import attention, convolution, maths
from peftcli.methods.rowcol.attention import Projections
from peftcli.models import families, loading, roles
from peftcli.models.compact.layers import Factored, TiedConv2d, TiedLinear
from peftcli.models.compact.registered import compacted
from peftcli.testing import tiny

EXACT = {"atol": 1e-10, "rtol": 0}


def factors(*ranks: int) -> dict:
    return {"kind": "factors", "ranks": list(ranks)}


def tie(to: str, transposed: bool = True, diagonal: bool = False) -> dict:
    return {"kind": "tied", "to": to, "transposed": transposed, "diagonal": diagonal}


def halves(model: nn.Module) -> dict[str, dict]:
    """Parts of each kind that the model can have, of about half the size."""
    found = {}
    for name, layer in model.named_modules():
        if type(layer).__name__ == "ViTAttention":
            found[name] = {"kind": "heads", "width": 4}
        elif name.endswith((".fc1", "up_proj", ".o_proj", "layer.0.convolution")):
            found[name] = factors(6)
        elif name.endswith("layer.1.convolution"):
            found[name] = factors(2, 3)
    if "vit.layers.0.mlp.fc2" in dict(model.named_modules()):
        found["vit.layers.0.mlp.fc2"] = factors(6)
        found["vit.layers.0.mlp.fc2.expand"] = tie("vit.layers.0.mlp.fc1.reduce")
    return {n: p for n, p in found.items() if ".attention." not in n or "ViT" not in type(model).__name__}


BASES = {"vit": tiny.vit, "resnet": tiny.resnet, "llama": tiny.llama}


@pytest.mark.parametrize("kind", BASES)
def test_a_saved_folder_is_all_it_takes(kind, tmp_path):
    base = BASES[kind](torch.float32)
    before = sum(p.numel() for p in base.model.parameters())
    model = compacted(base.model, halves(base.model))
    for parameter in model.parameters():
        torch.manual_seed(parameter.numel())
        nn.init.normal_(parameter, std=0.2)
    expected = base.outputs(model)
    assert sum(p.numel() for p in model.parameters()) < before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model.save_pretrained(tmp_path)
    peftcli.register_with_transformers()
    auto = AutoModelForCausalLM if kind == "llama" else AutoModelForImageClassification
    again, found = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found[one] for one in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(model)
    assert again.config.model_type == f"compact_{kind}"
    again.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(base.outputs(again.eval()), expected, atol=1e-5, rtol=1e-5)
    assert families.find(again.config.model_type) is base.family


def test_a_run_can_start_from_it(tmp_path):
    base = tiny.vit(torch.float32)
    model = compacted(
        base.model, {"vit.layers.1.mlp.fc1": factors(5), "vit.layers.1.mlp.fc2": tie("vit.layers.0.mlp.fc1")}
    )
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}, "do_normalize": true, '
        '"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_resize": true, "do_rescale": true}'
    )
    config = ModelConfig(name=str(tmp_path), source="folder")
    loaded = loading.load(config, "fp32", "image-classification", ["a", "b", "c"])
    assert torch.equal(base.outputs(loaded.model.eval()), base.outputs(model))
    shadow = loading.load(config, "fp32", "image-classification", ["a", "b", "c"], meta=True)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert {name: p.shape for name, p in shadow.model.named_parameters()} == shapes


def test_adapters_go_into_the_smaller_layers():
    base = tiny.vit()
    model = compacted(base.model, {"vit.layers.0.mlp.fc1": factors(5)})
    names = roles.resolve(model, base.family, ["mlp.up"])
    assert names == ["vit.layers.0.mlp.fc1.reduce", "vit.layers.0.mlp.fc1.expand", "vit.layers.1.mlp.fc1"]
    adapted = LoraMethod(Lora(r=2, targets=["mlp.up"])).attach(model, base.family)
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 3


def test_factors_at_full_rank_are_the_layer():
    base = tiny.resnet()
    expected = base.outputs(base.model)
    old = {name: layer for name, layer in base.model.named_modules() if isinstance(layer, nn.Conv2d)}
    parts = {name: factors(*layer.weight.shape[1::-1]) for name, layer in old.items() if layer.kernel_size == (3, 3)}
    parts |= {name: factors(min(layer.weight.shape[:2])) for name, layer in old.items() if layer.kernel_size == (1, 1)}
    model = compacted(base.model, parts)
    with torch.no_grad():
        for name, part in parts.items():
            weight = old[name].weight
            found = (
                convolution.tucker2(weight, *part["ranks"])
                if len(part["ranks"]) == 2
                else convolution.by_filters(weight, None, *part["ranks"])
            )
            for layer, kernel in zip(model.get_submodule(name), found, strict=True):
                layer.weight.copy_(kernel)
    torch.testing.assert_close(base.outputs(model), expected, **EXACT)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_narrower_heads_are_the_attention_where_nothing_is_cut(kernel):
    base = tiny.vit()
    base.model.set_attn_implementation(kernel)
    for name, parameter in base.model.named_parameters():
        if name.endswith("proj.bias"):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    old = {name: m for name, m in base.model.named_modules() if type(m).__name__ == "ViTAttention"}
    rank = 5  # of 8: make the products of that rank, so that cutting loses nothing
    with torch.no_grad():
        for m in old.values():
            for one in (m.q_proj, m.v_proj):
                one.weight.unflatten(0, (4, 8))[:, rank:] = 0
            m.q_proj.bias.unflatten(0, (4, 8))[:, rank:] = 0
    expected = base.outputs(base.model)
    given = {
        name: Projections(
            *(getattr(m, f"{one}_proj").weight.clone() for one in "qkvo"), m.q_proj.bias, m.o_proj.bias, m.v_proj.bias
        )
        for name, m in old.items()
    }
    model = compacted(base.model, {name: {"kind": "heads", "width": rank} for name in old})
    for name, before in given.items():
        found, m = attention.joint(before, 4, rank, None), model.get_submodule(name)
        new = {"q_proj.weight": found.q, "k_proj.weight": found.k, "v_proj.weight": found.v, "o_proj.weight": found.o}
        m.load_state_dict({**new, "q_proj.bias": found.q_bias, "o_proj.bias": found.o_bias})
    close = EXACT if kernel == "sdpa" else {"atol": 1e-6, "rtol": 0}  # Transformers' own softmax is float32
    torch.testing.assert_close(base.outputs(model), expected, **close)


def test_it_exports_as_a_plain_graph():
    base = tiny.vit(torch.float32)
    model = compacted(base.model, halves(base.model))
    model.config.return_dict = True
    program = torch.export.export(Logits(model), (base.batch["pixel_values"],))
    stored = io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    again = torch.export.load(stored).module()
    torch.testing.assert_close(again(base.batch["pixel_values"]), base.outputs(model))
    held = sum(p.numel() for p in program.state_dict.values() if p.is_floating_point())
    assert held == sum(p.numel() for p in model.parameters())


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixels):
        return self.model(pixel_values=pixels).logits


def test_a_tied_layer_has_no_weight_of_its_own(tmp_path):
    base = tiny.vit(torch.float32)
    parts = {f"vit.layers.{i}.mlp.fc2": tie(f"vit.layers.{i}.mlp.fc1", diagonal=True) for i in (0, 1)}
    before = sum(p.numel() for p in base.model.parameters())
    model = compacted(base.model, parts)
    assert before - sum(p.numel() for p in model.parameters()) == 2 * (32 * 48 - 48)
    up, down = model.vit.layers[0].mlp.fc1, model.vit.layers[0].mlp.fc2
    nn.init.normal_(down.diagonal)
    assert isinstance(down, TiedLinear)
    assert sum(p is up.weight for p in model.parameters()) == 1
    assert {name for name in model.state_dict() if ".0.mlp" in name} == {
        f"vit.layers.0.mlp.{one}" for one in ("fc1.weight", "fc1.bias", "fc2.bias", "fc2.diagonal")
    }
    model.save_pretrained(tmp_path)
    read = type(model).from_pretrained(tmp_path)
    assert torch.equal(base.outputs(read.eval()), base.outputs(model))
    for other in (copy.deepcopy(model), copy.deepcopy(model).half(), copy.deepcopy(model).to("meta"), read):
        source, tied = other.vit.layers[0].mlp.fc1, other.vit.layers[0].mlp.fc2
        assert tied.source is source
        assert source.weight is not up.weight
        assert tied.weight.dtype == source.weight.dtype
    with torch.no_grad():
        up.weight.mul_(2)
    assert torch.equal(down.weight, up.weight.T)
    assert not torch.equal(read.vit.layers[0].mlp.fc1.weight, up.weight)


@pytest.mark.parametrize("transposed", [True, False])
def test_tied_layers_compute_and_learn_as_two_of_one_matrix(transposed):
    torch.manual_seed(0)
    source, x = nn.Linear(5, 7).double(), torch.randn(4, 5).double()
    tied = TiedLinear(source, transposed, bias=True, diagonal=transposed).double()
    for parameter in tied.parameters():
        nn.init.normal_(parameter)
    W = source.weight.detach().clone()
    first, second = W.clone().requires_grad_(), (W.T if transposed else W).clone().requires_grad_()
    z = torch.relu(x @ first.T + source.bias) if transposed else x @ first.T
    factor = 1 if tied.diagonal is None else tied.diagonal
    y = (z * factor if transposed else x) @ second.T + tied.bias
    same = tied(torch.relu(source(x)) if transposed else x)
    torch.testing.assert_close(same, y, atol=1e-12, rtol=0)
    (y.square().sum() + z.sum()).backward()
    ((same.square().sum()) + (torch.relu(source(x)) if transposed else source(x) - source.bias).sum()).backward()
    together = first.grad + (second.grad.T if transposed else second.grad)
    torch.testing.assert_close(source.weight.grad, together, atol=1e-10, rtol=0)
    run = lambda weight: torch.func.functional_call(source, {"weight": weight}, (x,)) @ weight  # noqa: E731
    assert torch.autograd.gradcheck(run, source.weight)


def test_a_tied_convolution_is_the_transposed_one():
    source = nn.Conv2d(6, 4, 1, bias=False).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    tied = TiedConv2d(source, transposed=True, bias=False, diagonal=False, stride=2)
    expected = nn.functional.conv2d(x, source.weight.permute(1, 0, 2, 3), stride=2)
    torch.testing.assert_close(tied(x), expected, atol=1e-12, rtol=0)


def test_with_a_relu_a_tied_pair_is_the_slope_of_a_convex_function_and_with_a_diagonal_not():
    torch.manual_seed(1)
    up = nn.Linear(6, 20).double()
    for diagonal in (False, True):
        down = TiedLinear(up, True, bias=False, diagonal=diagonal).double()
        if diagonal:
            nn.init.normal_(down.diagonal)
        J = torch.autograd.functional.jacobian(lambda x, down=down: down(torch.relu(up(x))), torch.randn(6).double())
        torch.testing.assert_close(J, J.T, atol=1e-12, rtol=0)
        assert (torch.linalg.eigvalsh(J)[0] > -1e-12) is not diagonal or diagonal


def vit_s(parts: bool) -> nn.Module:
    shape = ViTConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6, num_labels=1000
    )
    with torch.device("meta"):
        model = ViTForImageClassification(shape)
    if not parts:
        return model
    ties = {"attention.o_proj": "attention.q_proj", "attention.v_proj": "attention.k_proj", "mlp.fc2": "mlp.fc1"}
    blocks = [f"vit.layers.{i}." for i in range(12)]
    return compacted(model, {block + one: tie(block + to) for block in blocks for one, to in ties.items()})


def test_the_papers_counts():
    assert sum(p.numel() for p in vit_s(False).parameters()) == 22_050_664
    assert sum(p.numel() for p in vit_s(True).parameters()) == 11_433_832
    with torch.device("meta"):
        model = ResNetForImageClassification(ResNetConfig(num_labels=1000))
    model = compacted(model, {f"resnet.encoder.stages.{i}": {"kind": "halvit"} for i in (2, 3)})
    assert sum(p.numel() for p in model.resnet.parameters()) == 13_466_176


def test_tying_saves_no_arithmetic():
    counts = []
    for parts in (False, True):
        model = vit_s(parts)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(pixel_values=torch.empty(1, 3, 224, 224, device="meta"))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 8e9


def test_a_halvit_stage_learns_and_is_read_back(tmp_path):
    base = tiny.resnet_awake(torch.float32)
    model = compacted(base.model, {f"resnet.encoder.stages.{i}": {"kind": "halvit"} for i in (0, 1)})
    model.requires_grad_(True).train()
    base.loss(model).backward()
    assert all(p.grad is not None for p in model.parameters())
    shared = {id(m.source) for m in model.modules() if isinstance(m, TiedConv2d)}
    assert len(shared) == 2
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(base.outputs(type(model).from_pretrained(tmp_path).eval()), base.outputs(model))


def test_what_cannot_be_rebuilt_is_said():
    for parts, said in (
        ({"vit.layers.0.mlp.fc9": factors(2)}, "unknown module of a compact model 'vit.layers.0.mlp.fc9'"),
        ({"vit.layers.0.mlp.fc1": {"kind": "dream"}}, "unknown kind of part 'dream'"),
        ({"vit.layers.0.mlp.fc1": factors(2, 3)}, "a Linear cannot be factors"),
        ({"vit.layers.0.attention.o_proj": tie("vit.layers.0.mlp.fc1")}, r"\[48, 32\] cannot do for one of \[32, 32\]"),
        ({"vit.layers.0.mlp.fc2": tie("vit.layers.0.mlp")}, "has no weight of its own"),
        ({"vit.layers.0.mlp": {"kind": "heads", "width": 2}}, "has no heads"),
    ):
        with pytest.raises(UserError, match=said):
            compacted(tiny.vit().model, parts)


def test_a_factored_layer_is_a_plain_sequence():
    model = compacted(tiny.vit().model, {"vit.layers.0.mlp.fc1": factors(5)})
    layer = model.vit.layers[0].mlp.fc1
    assert isinstance(layer, Factored)
    assert [type(one) for one in layer] == [nn.Linear, nn.Linear]
    assert (layer.reduce.bias, layer.expand.bias is None) == (None, False)
    W = maths.truncated(torch.randn(48, 32), None, 5)
    layer.reduce.weight.data, layer.expand.weight.data = W.reduce, W.expand
    x = torch.randn(3, 32, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ W.product().T + layer.expand.bias)
