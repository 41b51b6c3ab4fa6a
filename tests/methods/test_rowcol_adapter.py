"""Cores on tiny models: where bases come from, what is saved, ranks, and plain messages for what cannot be."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn

import peftcli
from peftcli.config.errors import UserError
from peftcli.methods.contract import Calibration
from peftcli.methods.rowcol import bases, maths, moments
from peftcli.methods.rowcol.config import RowcolConfig
from peftcli.methods.rowcol.layer import RowcolLayer
from peftcli.methods.rowcol.settings import Settings
from peftcli.methods.rowcol.tuner import Method
from peftcli.models.family import Family
from peftcli.testing import tiny
from peftcli.testing.rows import nudge, trained


def calibration(base: tiny.Base, batches: int = 1) -> Calibration:
    return Calibration([[base.batch]] * batches, lambda model, _: base.loss(model), batches, 3)


def attached(base: tiny.Base, **settings):
    method = Method(Settings(**settings))
    return method, method.attach(base.model, base.family, calibration(base))


def layers(model) -> dict[str, RowcolLayer]:
    return {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, RowcolLayer)}


def inputs_of(base: tiny.Base, name: str) -> torch.Tensor:
    kept = []
    hook = base.model.get_submodule(name).register_forward_pre_hook(lambda _, x: kept.append(x[0].detach().double()))
    base.model(**base.batch)
    hook.remove()
    return kept[0]


@pytest.mark.parametrize("basis", ["data", "weight", "gradient"])
def test_a_core_has_the_square_of_its_rank_and_starts_as_nothing(basis):
    base = tiny.vit()
    before = base.outputs(base.model)
    _, model = attached(base, rank=6, basis=basis, targets=["attention", "mlp"])
    cores = [p for name, p in trained(model).items() if "rowcol_" in name]
    assert len(cores) == 12
    ranks = list(model.peft_config["default"].rank_pattern.values())
    assert ranks == [6] * 12 or basis == "gradient"  # the last block's q learns from one position a picture
    assert [core.shape for core in cores] == [(rank, rank) for rank in ranks]
    assert not any(core.any() for core in cores)
    assert torch.equal(base.outputs(model), before)
    for layer in layers(model).values():
        for basis_ in (layer.rowcol_U["default"], layer.rowcol_V["default"]):
            one_KK = torch.eye(basis_.shape[1], dtype=torch.float64)
            torch.testing.assert_close(basis_.T @ basis_, one_KK, atol=1e-10, rtol=0)


def test_data_bases_are_of_what_goes_in_and_comes_out_and_q_k_v_share_one():
    base = tiny.vit()
    name = "vit.layers.1.attention.q_proj"
    x = inputs_of(base, name).flatten(0, -2)
    C, W = x.T @ x / len(x), base.model.get_submodule(name).weight.detach()
    _, model = attached(base, rank=5, targets=["attention"])
    found = layers(model)
    V, U = found[name].rowcol_V["default"], found[name].rowcol_U["default"]
    y = x @ W.T
    for basis, moment in ((V, C), (U, y.T @ y / len(y))):
        held = (basis.T @ moment @ basis).trace()
        torch.testing.assert_close(held, torch.linalg.eigvalsh(moment)[-5:].sum())
    for other in ("k_proj", "v_proj"):
        same = found[name.replace("q_proj", other)]
        assert torch.equal(same.rowcol_V["default"], V)
        assert not torch.equal(same.rowcol_U["default"], U)
    assert not torch.equal(found[name.replace("q_proj", "o_proj")].rowcol_V["default"], V)


def test_padding_is_not_looked_at():
    base = tiny.llama()
    name = "model.layers.0.self_attn.q_proj"
    ((found, moment),) = moments.visit(base.model, {name: base.model.get_submodule(name)}, calibration(base, 3), 2)
    x = inputs_of(base, name)[base.batch["attention_mask"] != 0]
    assert (found, moment.positions) == (name, 2 * 12)
    torch.testing.assert_close(moment.mean, x.T @ x / len(x))
    assert not base.model.training


def test_moments_come_in_several_passes_where_memory_is_short(monkeypatch):
    base, seen = tiny.resnet(), []
    names = [n for n, m in base.model.named_modules() if isinstance(m, nn.Conv2d)]
    convolutions = {name: base.model.get_submodule(name) for name in names}
    counted = Calibration([[base.batch]], lambda model, _: seen.append(1) or base.loss(model), 1, 3)
    whole = dict(moments.visit(base.model, convolutions, counted, 1))
    assert len(seen) == 1
    monkeypatch.setattr(moments, "TOGETHER", 30_000)
    again = dict(moments.visit(base.model, convolutions, counted, 1))
    assert len(seen) > 2
    assert list(again) == names
    assert all(torch.equal(again[name].mean, whole[name].mean) for name in names)


def test_shared_bases_of_weights_are_of_the_stacked_projections():
    base = tiny.llama()
    block = base.model.model.layers[0].self_attn
    stack = torch.cat([block.q_proj.weight, block.k_proj.weight, block.v_proj.weight])
    _, model = attached(base, rank=5, basis="weight", targets=["attention"])
    V = layers(model)["model.layers.0.self_attn.v_proj"].rowcol_V["default"]
    best = torch.linalg.svdvals(stack)[:5].square().sum()
    torch.testing.assert_close((stack @ V).square().sum(), best)


@pytest.mark.parametrize("save_dtype", ["float32", "bfloat16"])
def test_each_basis_is_saved_once_and_read_back(save_dtype, tmp_path):
    peftcli.register_with_peft()
    base, fresh = tiny.llama(torch.float32), tiny.llama(torch.float32)
    _, model = attached(base, rank="auto", energy=0.6, targets=["attention", "mlp"], save_dtype=save_dtype)
    nudge(model)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as stored:
        rows = [key for key in stored.keys() if "rowcol_V" in key]  # noqa: SIM118 - it is no mapping
        kinds = {str(stored.get_tensor(key).dtype) for key in rows}
    found = layers(model)
    assert len(rows) == 2 * 4  # of q, k, v together; o; gate and up together; down
    assert kinds == {f"torch.{save_dtype}"}
    assert len({layer.rowcol_R["default"].shape for layer in found.values()}) > 1
    loaded = PeftModel.from_pretrained(fresh.model, tmp_path)
    assert torch.equal(base.outputs(loaded), base.outputs(model))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["start"] == "file"
    assert "bases" not in config


def test_a_script_of_plain_peft_needs_a_rank_and_targets_alone(tmp_path):
    peftcli.register_with_peft()
    base = tiny.llama()
    model = get_peft_model(base.model, RowcolConfig(rank=4, target_modules=["q_proj", "down_proj"]))
    W = layers(model)["model.layers.0.self_attn.q_proj"].base_layer.weight
    U, _, V = torch.linalg.svd(W)
    found = layers(model)["model.layers.0.self_attn.q_proj"]
    torch.testing.assert_close(maths.projector(found.rowcol_U["default"]), maths.projector(U[:, :4]))
    torch.testing.assert_close(maths.projector(found.rowcol_V["default"]), maths.projector(V[:4].T))
    nudge(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama().model, tmp_path)
    torch.testing.assert_close(base.outputs(loaded), base.outputs(model), atol=1e-6, rtol=0)


def test_sensitivity_is_the_squared_gradient_of_the_core():
    base = tiny.vit()
    _, model = attached(base, rank=4, targets=["attention.q", "mlp.up"])
    base.loss(model).backward()
    expected = {name: layer.rowcol_R["default"].grad.square() for name, layer in layers(model).items()}
    plain = tiny.vit()
    names = {name: plain.model.get_submodule(name) for name in expected}
    found = bases.of_data(plain.model, names, {}, dict.fromkeys(names, 4), calibration(plain), 1)
    gains = bases.sensitivities(plain.model, names, found, calibration(plain), 1)
    for name, gain in gains.items():
        assert gain == pytest.approx([expected[name][:k, :k].sum().item() for k in range(1, 5)])


def test_a_budget_counts_the_numbers_of_all_cores():
    for budget in (150, 400, 900):
        spent = {}
        for worth in ("energy", "sensitivity"):
            _, model = attached(tiny.vit(), rank="auto", budget=budget, worth=worth, targets=["attention", "mlp"])
            spent[worth] = [layer.rowcol_R["default"].shape[0] for layer in layers(model).values()]
            assert sum(rank**2 for rank in spent[worth]) <= budget
            assert min(spent[worth]) >= 1
        assert spent["energy"] != spent["sensitivity"]


def test_more_energy_takes_more_directions():
    last = 0
    for energy in (0.3, 0.7, 0.95, 1.0):
        method, model = attached(tiny.vit(), rank="auto", energy=energy, targets=["all"])
        ranks = model.peft_config["default"].rank_pattern
        assert sum(ranks.values()) > last
        last = sum(ranks.values())
        assert str(max(ranks.values())) in method.notes[-1]
    assert max(ranks.values()) == 32


def test_a_rank_beyond_the_space_is_the_whole_space():
    method, model = attached(tiny.vit(), rank=40, basis="weight", targets=["mlp.up"])
    assert set(model.peft_config["default"].rank_pattern.values()) == {32}
    assert method.notes == []


def test_the_bases_of_a_checkpoint_come_back_bit_for_bit():
    base = tiny.vit()
    method, model = attached(base, rank=4)
    nudge(model)
    state = {name: tensor.clone() for name, tensor in method.state(model).items()}
    expected = base.outputs(model)
    for layer in layers(model).values():
        layer.rowcol_U["default"].mul_(-1)
    assert not torch.equal(base.outputs(model), expected)
    method.restore(model, state)
    assert torch.equal(base.outputs(model), expected)


def test_on_the_meta_device_it_is_counted_as_it_will_be():
    real = attached(tiny.vit(torch.float32), rank=20, targets=["all"])[1]
    shadow = tiny.vit(torch.float32)
    shadow.model.to("meta")
    method = Method(Settings(rank=20, targets=["all"]))
    counted = method.attach(shadow.model, shadow.family)
    assert {n: p.shape for n, p in trained(counted).items()} == {n: p.shape for n, p in trained(real).items()}
    assert "0.00 GB" in method.notes[0]


def test_too_few_positions_for_the_rank_are_named():
    base = tiny.llama()
    with pytest.raises(UserError, match=r"12 positions of the calibration rows cannot show 20 directions of .*q_proj"):
        attached(base, rank=20)
    with pytest.raises(UserError, match="there is none"):
        Method(Settings()).attach(base.model, base.family)
    with pytest.raises(UserError, match=r"budget of 3 is less than 4"):
        attached(tiny.llama(), rank="auto", budget=3)


class Grouped(nn.Module):
    """A convolution of each kind."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.round = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.last(self.round(self.grouped(self.depthwise(self.first(x))))).mean((2, 3))


def test_grouped_convolutions_are_left_out_and_listed():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    rows = Calibration([[{"x": x}]], lambda model, batch: model(**batch).sum(), 1, 1)
    method = Method(Settings(rank=2, targets=[".*"]))
    with pytest.raises(UserError, match=r"adapts none of the targets.*depthwise: each channel has its own filter"):
        Method(Settings(targets=["depthwise", "grouped"])).attach(Grouped(), Family("none", ()), rows)
    model = method.attach(Grouped(), Family("none", ()), rows)
    assert list(layers(model)) == ["first", "last"]
    assert method.notes[0].startswith("left out 3 of 5 targets")
    assert "grouped: its channels are in groups" in method.notes[0]
    assert "round: it pads by 'circular'" in method.notes[0]


def test_other_layers_are_refused_by_name():
    with pytest.raises(UserError, match="rowcol cannot adapt a Embedding"):
        attached(tiny.llama(), targets=["embed"], basis="weight")
