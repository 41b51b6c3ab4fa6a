"""KPSVD's layer and tuner: both ways of computing, the base's bits, files, several adapters, plain PEFT, mistakes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from peftcli.config.errors import UserError
from peftcli.methods.kpsvd import maths, plan
from peftcli.methods.kpsvd.config import KpsvdConfig
from peftcli.methods.kpsvd.function import KroneckerLayer, Product
from peftcli.methods.kpsvd.layer import KpsvdLayer
from peftcli.methods.kpsvd.shift import Shift
from peftcli.methods.kpsvd.tuner import PEFT_TYPE
from peftcli.methods.peft_types import register
from peftcli.testing.rows import Row, nudge, train
from peftcli.testing.tiny import llama
from peftcli.training.ledger import Ledger

register(PEFT_TYPE)
BOTH = pytest.mark.parametrize("formed", [True, False], ids=["formed", "factors"])


@pytest.fixture
def way(monkeypatch):
    """Choose how the terms are computed with, whatever is cheaper."""

    def _way(formed: bool) -> None:
        monkeypatch.setattr(plan, "forms_product", lambda *_: formed)
        monkeypatch.setattr(plan, "forms_gradient", lambda *_: formed)

    return _way


def draw(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layers(model: Any) -> list[KpsvdLayer]:
    return [module for module in model.modules() if isinstance(module, KpsvdLayer)]


class Net(nn.Module):
    """A convolution, a grouped one and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 4, (1, 3), groups=2, dilation=2, bias=False)
        self.linear = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.grouped(self.conv(x).tanh()).mean((2, 3)))


def net(dtype: torch.dtype = torch.float64, **config: Any) -> tuple[Net, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        base = Net().to(dtype)
    targets = ["conv", "grouped", "linear"]
    return base, get_peft_model(copy.deepcopy(base), KpsvdConfig(target_modules=targets, **config)).eval()


@BOTH
@pytest.mark.parametrize("first", [False, True], ids=["residual", "delta"])
def test_outputs_and_gradients_of_the_function(formed, first, way):
    way(formed)
    U, V, W = draw(3, 3, 4), draw(3, 5, 2, seed=1), draw(15, 8, seed=2)
    U0, V0 = (draw(3, 3, 4, seed=3), draw(3, 5, 2, seed=4)) if first else (None, None)
    x, bias = draw(2, 6, 8, seed=5), draw(15, seed=6)
    whole = W + maths.total(U, V) - (maths.total(U0, V0) if first else 0)

    def layer(x: torch.Tensor, U: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
        return KroneckerLayer.apply(x, U, V, W, bias, U0, V0, Product(torch.float64))

    torch.testing.assert_close(layer(x, U, V), x @ whole.T + bias)
    inputs = tuple(tensor.requires_grad_() for tensor in (x, U, V))
    assert torch.autograd.gradcheck(layer, inputs)


@BOTH
@pytest.mark.parametrize("first", [False, True], ids=["residual", "delta"])
def test_bfloat16_is_as_close_as_its_digits(formed, first, way):
    way(formed)
    low = torch.bfloat16
    U, V, W = draw(2, 8, 8, dtype=torch.float32), draw(2, 8, 8, seed=1, dtype=torch.float32), draw(64, 64, dtype=low)
    U0, V0 = (U + 1e-4 * torch.randn_like(U), V.clone()) if first else (None, None)
    x = draw(50, 64, seed=5, dtype=low)
    y = KroneckerLayer.apply(x, U, V, W, None, U0, V0, Product(low))
    whole = W.float() + (maths.total(*maths.change(U, V, U0, V0)) if first else maths.total(U, V))
    assert y.dtype == low
    assert (y.float() - x.float() @ whole.T).norm() < 0.01 * y.float().norm()
    if first:  # a change far below the weight's rounding is seen
        change = (y.float() - (x @ W.T).float()).norm() / (x.float() @ (whole - W.float()).T).norm()
        assert change < 60


def test_the_cheaper_way_is_taken():
    square, many, one = maths.Split(64, 64, 64, 64), 4096, 1
    assert not plan.forms_product(one, 2, square, True)
    assert plan.forms_product(many, 8, square, True)
    assert not plan.forms_gradient(many, 1, square)
    assert plan.forms_gradient(many, 64, square)


@BOTH
def test_nothing_of_the_weights_size_is_kept(formed, way):
    way(formed)
    W = draw(256, 256, dtype=torch.float32)
    U = draw(1, 16, 16, dtype=torch.float32).requires_grad_()
    V, x = draw(1, 16, 16, dtype=torch.float32), draw(4, 256, dtype=torch.float32)
    with Ledger([W, U, V, x]) as book:
        y = KroneckerLayer.apply(x, U, V, W, None, None, None, Product(torch.float32))
        forward, kept = book.peak, book.live
        y.sum().backward()
    size = W.numel() * 4
    assert kept < 0.1 * size
    assert (forward >= size) == formed
    assert formed or book.peak < 0.5 * size


@pytest.mark.parametrize("base", ["residual", "delta"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_convolutions_and_their_gradients(base, dtype):
    untouched, model = net(dtype, base=base, rank=2, sigma="trained")
    x = draw(2, 6, 9, 9, dtype=dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    if base == "delta":
        assert torch.equal(model(x), untouched(x))
    torch.testing.assert_close(model(x), untouched(x), rtol=tolerance, atol=tolerance)
    nudge(model)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(x), model(x), rtol=tolerance, atol=2 * tolerance)
    if dtype == torch.float64:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        model(x).square().sum().backward()
        for parameter in trained.values():
            direction, slope = torch.randn_like(parameter), 0.0
            for sign in (1, -1):
                with torch.no_grad():
                    parameter += sign * 1e-6 * direction
                    slope += sign * model(x).square().sum().item() / 2e-6
                    parameter -= sign * 1e-6 * direction
            assert slope == pytest.approx((parameter.grad * direction).sum().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_shifted_weight_comes_back_bit_for_bit(dtype, sign):
    weight = draw(64, 96, dtype=dtype) * 0.05
    weight[0, 0], weight[1, 1] = 0.0, -0.0
    before = weight.clone()
    shift = Shift(weight, draw(3, 8, 8, seed=1).float() * 0.1, draw(3, 8, 12, seed=2).float() * 0.1, sign)
    assert not torch.equal(weight, before)
    assert shift.kept < weight.numel() / 2
    wider = weight.float() if dtype in (torch.bfloat16, torch.float16) else weight.clone()
    for again in (weight, wider):
        shift.undo(again)
        assert torch.equal(again, before.to(again.dtype))
    assert torch.equal(torch.signbit(weight), torch.signbit(before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_base_has_its_own_bits_whenever_the_adapter_is_not_alone(dtype):
    row = Row("kpsvd", {"rank": 2}, dtype=dtype)
    untouched, model, _ = row.attached()
    expected = untouched.model.model.layers[0].self_attn.q_proj.weight
    weight = layers(model)[0].base_layer.weight
    moved = weight.clone()
    assert not torch.equal(moved, expected)
    with model.disable_adapter():
        assert torch.equal(weight, expected)
        assert torch.equal(untouched.outputs(model), untouched.outputs(untouched.model))
    assert torch.equal(weight, moved)
    nudge(model)
    adapted = untouched.outputs(model)
    model.merge_adapter()
    assert not torch.equal(weight, moved)
    model.unmerge_adapter()
    assert torch.equal(weight, moved)
    assert torch.equal(untouched.outputs(model), adapted)
    model.add_adapter("second", KpsvdConfig(rank=1, target_modules=["q_proj"]))
    assert torch.equal(weight, expected)
    model.delete_adapter("second")
    assert torch.equal(weight, moved)
    assert torch.equal(model.unload().model.layers[0].self_attn.q_proj.weight, expected)


def test_two_active_adapters_add_up():
    _, model, _ = Row("kpsvd", {"rank": 2, "base": "delta"}).attached()
    model.add_adapter("second", KpsvdConfig(rank=1, target_modules=["q_proj"]))
    nudge(model)
    layer = layers(model)[0]
    nn.init.normal_(layer.kpsvd_U["second"], std=0.1)
    layer.set_adapter(["default", "second"])
    x = draw(5, 32)
    whole = layer.base_layer.weight + layer.get_delta_weight("default") + layer.get_delta_weight("second")
    torch.testing.assert_close(layer(x), x @ whole.T)


@pytest.mark.parametrize("alpha", [None, 1.0, 32.0])
@pytest.mark.parametrize("sigma", ["absorbed", "trained"])
def test_the_scale_leaves_the_start_alone(alpha, sigma):
    untouched, model, _ = Row("kpsvd", {"rank": 2, "alpha": alpha, "sigma": sigma}).attached()
    torch.testing.assert_close(untouched.outputs(model), untouched.outputs(untouched.model))
    layer = layers(model)[0]
    U, V = layer.factors("default")
    size = (U.flatten(1).norm(dim=1) * V.flatten(1).norm(dim=1)).detach()
    sigma_K = model.base_model.starts["default"]["model.layers.0.self_attn.q_proj"].terms.sigma[:2]
    torch.testing.assert_close(size, sigma_K)


def test_column_and_row_factors_are_pissa():
    ours, base = llama(torch.float32), llama(torch.float32)
    config = KpsvdConfig(rank=3, factors="thin", target_modules=["q_proj", "v_proj"])
    model = get_peft_model(ours.model, config).eval()
    pissa_config = LoraConfig(r=3, lora_alpha=3, init_lora_weights="pissa", target_modules=["q_proj", "v_proj"])
    pissa: Any = get_peft_model(base.model, pissa_config).eval()
    for name, theirs in pissa.named_modules():
        if hasattr(theirs, "lora_A"):
            layer = model.get_submodule(name)
            torch.testing.assert_close(layer.base_layer.weight, theirs.base_layer.weight, rtol=1e-4, atol=1e-5)
            A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
            U, V = layer.kpsvd_U["default"][:, :, 0], layer.kpsvd_V["default"][:, 0]
            signs = (U * B.T).sum(1).sign()[:, None]
            torch.testing.assert_close(U, signs * B.T, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(V, signs * A, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.outputs(model), base.outputs(pissa), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"base": "delta"}, {"sigma": "trained", "alpha": 8.0}])
@pytest.mark.parametrize("small", [False, True], ids=["whole", "bfloat16"])
def test_a_file_loads_with_plain_peft(settings, small, tmp_path: Path):
    more = {"save_dtype": "bfloat16"} if small else {}
    row = Row("kpsvd", {"rank": 2, **settings, **more}, dtype=torch.float32)
    base, model, _ = row.attached()
    train(model, row.new_method(), base, steps=5)
    expected = base.outputs(model)
    model.save_pretrained(tmp_path)  # before `finish`: the file must not depend on the base's present state
    stored = load_file(tmp_path / "adapter_model.safetensors")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(tensor.numel() for tensor in stored.values()) == 2 * trained
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16 if small else torch.float32}
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (said["peft_type"], said["start"], said["base"]) == ("KPSVD", "file", "delta")
    assert set(said["splits"]) == {"32x32", "16x32"}
    assert set(said["rank_pattern"].values()) == {2}
    for low_memory in (False, True):
        fresh = row.new_base()
        loaded = PeftModel.from_pretrained(fresh.model, str(tmp_path), low_cpu_mem_usage=low_memory).eval()
        change = (expected - base.outputs(base.model)).norm()
        assert (fresh.outputs(loaded) - expected).norm() < (0.02 if small else 1e-3) * change
        loaded.load_adapter(str(tmp_path), "again")
        loaded.set_adapter("again")
        assert (fresh.outputs(loaded) - expected).norm() < (0.02 if small else 1e-3) * change
    with pytest.raises(UserError, match="another kind"):
        get_peft_model(llama_with_lora(), KpsvdConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize("settings", [{}, {"base": "delta"}, {"sigma": "trained", "alpha": 8.0}])
def test_a_finished_adapter_is_what_its_bfloat16_file_holds(settings, tmp_path: Path):
    row = Row("kpsvd", {"rank": 2, **settings, "save_dtype": "bfloat16"}, dtype=torch.float32)
    base, model, method = row.attached()
    train(model, method, base, steps=5)
    unrounded = base.outputs(model)
    method.finish(model)
    expected = base.outputs(model)
    assert not torch.equal(expected, unrounded)
    model.save_pretrained(tmp_path)
    fresh = row.new_base()
    assert torch.equal(fresh.outputs(PeftModel.from_pretrained(fresh.model, str(tmp_path)).eval()), expected)


def llama_with_lora() -> Any:
    return get_peft_model(llama(torch.float32).model, LoraConfig(r=2, target_modules=["q_proj"])).base_model.model


def test_plain_peft_chooses_ranks_too():
    base = llama(torch.float32)
    config = KpsvdConfig(rank="auto", budget=2000, target_modules="all-linear")
    model = get_peft_model(base.model, config)
    assert set(config.rank_pattern) == {
        name for name, m in llama().model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"
    }
    assert 1900 < sum(p.numel() for p in model.parameters() if p.requires_grad) <= 2000


@pytest.mark.parametrize(
    ("break_it", "settings", "said"),
    [
        (lambda w: w.fill_(float("nan")), {}, "1024 of 1,024 values that are not finite"),
        (lambda w: w.zero_(), {}, "has 0 Kronecker terms of these shapes, and 2 are asked for"),
        (lambda w: w, {"rank": 999}, "and 999 are asked for"),
        (lambda w: w, {"splits": {"32x32": [5, 4, 8, 8]}}, "nearest factor pairs of 32: 4 x 8, 2 x 16, 8 x 4"),
        (lambda w: w, {"rank": "auto"}, "chooses by a calibration set, and there is none"),
        (lambda w: w, {"rank": "auto", "budget": 100}, "method.budget=100 is less than 1 term"),
        (lambda w: w, {"targets": ["embed"]}, "not Embedding"),
    ],
)
def test_mistakes_are_the_users(break_it, settings, said):
    row = Row("kpsvd", {"rank": 2, **settings}, dtype=torch.float32)
    base = row.new_base()
    with torch.no_grad():
        break_it(base.model.model.layers[1].self_attn.q_proj.weight)
    with pytest.raises(UserError) as caught:
        row.new_method().attach(base.model, base.family)
    assert said in str(caught.value)


def test_a_weight_without_contents_is_refused_unless_all_are():
    row = Row("kpsvd", {"rank": "auto", "energy": 0.5, "max_rank": 5}, dtype=torch.float32)
    base = row.new_base()
    base.model.model.layers[0].self_attn.q_proj.to("meta")
    with pytest.raises(UserError, match="meta device"):
        row.new_method().attach(base.model, base.family)
    base = row.new_base()
    model = row.new_method().attach(base.model.to("meta"), base.family)
    assert {layer.kpsvd_U["default"].shape[0] for layer in layers(model)} == {5}
    row.new_method().finish(model)


@pytest.mark.parametrize("kind", [nn.Conv1d(4, 4, 3), nn.Conv2d(4, 4, 3, padding="same"), nn.Bilinear(2, 2, 2)])
def test_layers_of_another_kind_are_refused(kind):
    with pytest.raises(UserError, match="KPSVD adapts"):
        get_peft_model(nn.Sequential(kind), KpsvdConfig(target_modules=["0"]))


def test_the_report_shows_every_module():
    from peftcli.reports.figures import method as draw_figures

    _, model, method = Row("kpsvd", {"rank": "auto", "energy": 0.4}).attached()
    (figure,) = method.figures(model)
    (drawing,) = draw_figures([figure])
    assert drawing.svg.count("layers.") == 4
    assert "bound by" in drawing.caption


def test_autocast_keeps_the_factors_gradients_in_their_own_type():
    _, model, _ = Row("kpsvd", {"rank": 2}, dtype=torch.float32).attached()
    base = llama(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        base.loss(model).backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
