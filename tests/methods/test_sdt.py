"""SDT on a model: what is trained and what stays, the warm-up's end, gradients, merging, pruning, files.

Shapes: as in peftcli/methods/sdt/layer.py.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MambaForCausalLM
from transformers.models.mamba.modeling_mamba import MambaMixer

import peftcli
from peftcli.config.errors import UserError
from peftcli.methods.contract import Calibration, Method
from peftcli.methods.sdt import maths
from peftcli.methods.sdt.config import SdtConfig
from peftcli.methods.sdt.layer import SdtLayer
from peftcli.methods.sdt.maths import Selection
from peftcli.methods.sdt.tuner import blocks, layers
from peftcli.models import mamba_mixer
from peftcli.testing import tiny
from peftcli.testing.rows import Row, nudge, train, trained
from peftcli.testing.tiny import Base

peftcli.register_with_peft()
EVERYWHERE = ["ssm.in", "ssm.x", "ssm.dt", "ssm.out"]
IDS = torch.arange(1, 13).reshape(2, 6)


def sdt(dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[Base, Any, Method]:
    return Row("sdt", settings, base=tiny.mamba).attached(dtype)


def warmed(**settings: Any) -> tuple[Base, Any, Method]:
    """An adapted model at the start of its warm-up."""
    row = Row("sdt", {"selector": "magnitude", "warmup": 1, **settings}, base=tiny.mamba)
    base, method = row.new_base(), row.new_method()
    model = method.attach(base.model, base.family, Calibration([[base.batch]], lambda m, _: base.loss(m), 9, 9))
    return row.new_base(), model, method


def layer_of(model: Any) -> SdtLayer:
    return next(layer for _, layer in layers(model))


def channels_of(model: Any, adapter: str = "default") -> list[list[int]]:
    return [layer.sdt_channels[adapter].tolist() for _, layer in layers(model)]


def stock(state: dict[str, Tensor] | None = None) -> MambaForCausalLM:
    """Transformers' own model with its own forward pass, in float32."""
    model = MambaForCausalLM(tiny.mamba_shape()).eval()
    model.load_state_dict(state or tiny.mamba(torch.float32).model.state_dict())
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("selector", ["taylor", "magnitude", "abar", "random"])
def test_the_start_is_the_base_bit_for_bit(selector: str) -> None:
    base, model, _ = sdt(torch.float32, selector=selector, lora_targets=EVERYWHERE)
    assert torch.equal(base.outputs(model), base.outputs(base.model))
    base, model, _ = warmed(selector="magnitude", lora_targets=EVERYWHERE)
    assert torch.equal(base.outputs(model), base.outputs(base.model))


def test_the_change_is_at_the_chosen_places_only() -> None:
    _, model, _ = sdt(channels=5, states=2, lora_targets=[])
    nudge(model)
    for _, layer in layers(model):
        (D, N), R = layer.shape, layer.base_layer.time_step_rank
        found = layer.selection("default")
        changes = layer.changes("default")
        assert changes.keys() == {"A_log", "x_proj.weight"}
        chosen_DN, columns_PD = torch.zeros(D, N, dtype=torch.bool), torch.zeros(R + 2 * N, D, dtype=torch.bool)
        for d, states in zip(found[0].channels_K, found[0].states_KS, strict=True):
            chosen_DN[d, states] = True
            columns_PD[R:, d] = True
        assert chosen_DN.sum() == 5 * 2
        assert torch.equal(changes["A_log"] != 0, chosen_DN)
        assert torch.equal(changes["x_proj.weight"] != 0, columns_PD)


def test_the_warm_up_leaves_nothing_behind_but_the_selection() -> None:
    base, model, method = warmed(channels=6, states=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert {name.split(".")[-3] for name in trained(model)} == {"sdt_warmup", "sdt_lora_A", "sdt_lora_B"}
    train(model, method, base)
    changes = {name: layer.sdt_warmup["default"]["A_log"].detach().clone() for name, layer in layers(model)}
    assert all(G_DN.any() for G_DN in changes.values())
    warm_lora = {name: p.detach().clone() for name, p in trained(model).items() if "sdt_lora" in name}
    method.stages(9)[1].start(model)
    assert base.outputs(model).equal(base.outputs(base.model))
    assert not any("sdt_warmup" in name for name, _ in model.named_parameters())
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after if ".sdt_" not in name)
    for name, value in warm_lora.items():
        assert not torch.equal(after[name], value)
        assert ("sdt_lora_B" in name) != after[name].any()
    for name, layer in layers(model):
        expected = maths.select(maths.magnitude(changes[name]), 6, 1)
        assert torch.equal(layer.selection("default")[0].channels_K, expected.channels_K)
        assert torch.equal(layer.selection("default")[0].states_KS, expected.states_KS)
        assert not any(values.any() for values in layer.sdt_values["default"].values())
    assert list(model.peft_config["default"].sizes.values()) == [[6, 1, 0]] * 2
    assert "6 of 64 channels and 1 of 4 states in each of 2 layers" in method.notes[0]


# Gradients.


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_gradients_and_a_step_are_those_of_masked_dense_training(kind: type[torch.optim.Optimizer]) -> None:
    base, model, _ = sdt(channels=7, states=2, lora_targets=[])
    dense = tiny.mamba()
    mixers = blocks(dense.model)
    scored = [p for mixer in mixers.values() for p in (mixer.A_log, mixer.x_proj.weight)]
    for parameter in scored:
        parameter.requires_grad_(True)
    base.loss(model).backward()
    dense.loss(dense.model).backward()
    for name, layer in layers(model):
        mixer, selection = mixers[name], layer.selection("default")[0]
        K, S = selection.channels_K, selection.states_KS
        values = layer.sdt_values["default"]
        torch.testing.assert_close(values["A_log"].grad, mixer.A_log.grad[K].gather(1, S))
        torch.testing.assert_close(values["x_proj"].grad, mixer.x_proj.weight.grad[-8:, K])
        masked_DN, masked_PD = torch.zeros_like(mixer.A_log), torch.zeros_like(mixer.x_proj.weight)
        masked_DN[K[:, None], S] = mixer.A_log.grad[K[:, None], S]
        masked_PD[-8:, K] = mixer.x_proj.weight.grad[-8:, K]
        mixer.A_log.grad, mixer.x_proj.weight.grad = masked_DN, masked_PD
    for parameters in (trained(model).values(), scored):
        kind(parameters, lr=0.1, weight_decay=0.0).step()
    model.merge_adapter()
    for name, layer in layers(model):
        torch.testing.assert_close(layer.base_layer.A_log, mixers[name].A_log)
        torch.testing.assert_close(layer.base_layer.x_proj.weight, mixers[name].x_proj.weight)
    torch.testing.assert_close(base.outputs(model), dense.outputs(dense.model))


@pytest.mark.parametrize("installed", [False, True])
def test_lora_learns_on_out_proj_whichever_forward_pass_the_base_has(installed: bool) -> None:
    base = stock()
    if installed:
        mamba_mixer.install(base)
    sizes = {name: [3, 2, 0] for name in blocks(base)}
    model = get_peft_model(base, SdtConfig(target_modules=["mixer"], task_type="CAUSAL_LM", sizes=sizes))
    nudge(model)
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    for _, layer in layers(model):
        for factor in (layer.sdt_lora_A, layer.sdt_lora_B):
            assert factor["default"]["out_proj"].grad.any()


# Merging.


def test_a_merged_model_needs_nothing_of_this_package() -> None:
    _, model, _ = sdt(torch.float32, channels=9, lora_targets=EVERYWHERE)
    nudge(model)
    tuned = logits(model)
    before = copy.deepcopy(model.state_dict())
    model.merge_adapter()
    torch.testing.assert_close(logits(model), tuned)
    model.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), tuned)
    plain = stock(model.merge_and_unload().state_dict())
    assert {type(mixer).forward for mixer in blocks(plain).values()} == {MambaMixer.forward}
    torch.testing.assert_close(logits(plain), tuned)


def test_merging_into_values_that_are_not_finite_is_refused_whole() -> None:
    _, model, _ = sdt()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        layer_of(model).sdt_values["default"]["A_log"][0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite; nothing was merged"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if "sdt_values" not in n)


# Pruning.


def silenced(base: Base, model: Any, mixer: Any, channel: int) -> bool:
    """Whether the outputs are the same bits however loud the channel is."""
    before = base.outputs(model)
    with torch.no_grad():
        mixer.D[channel] += 1e6
    after = base.outputs(model)
    with torch.no_grad():
        mixer.D[channel] -= 1e6
    return torch.equal(before, after)


def test_a_pruned_channel_contributes_exactly_nothing() -> None:
    base, model, _ = sdt(pruned=9, channels=3)
    nudge(model)
    layer = layer_of(model)
    selection, pruned_X = layer.selection("default")
    assert len(pruned_X) == 9
    assert set(pruned_X.tolist()).isdisjoint(selection.channels_K.tolist())
    mixer = layer.base_layer
    for merge in (lambda: None, model.merge_adapter):
        merge()
        assert silenced(base, model, mixer, int(pruned_X[4]))
        assert not silenced(base, model, mixer, int(selection.channels_K[0]))
    assert not mixer.out_proj.weight[:, pruned_X].any()
    model.unmerge_adapter()
    with model.disable_adapter():
        assert not silenced(base, model, mixer, int(pruned_X[4]))


@pytest.mark.parametrize("order", [["default", "second"], ["second", "default"]])
def test_what_one_adapter_prunes_stays_silent_when_another_is_merged_too(order: list[str]) -> None:
    base, model, _ = sdt(pruned=9, channels=3)
    config = copy.deepcopy(model.peft_config["default"])
    config.sizes = {name: [4, 1, 0] for name in config.sizes}
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    nudge(model)
    together = base.outputs(model)
    model.merge_adapter(order)
    layer = layer_of(model)
    assert not layer.base_layer.out_proj.weight[:, layer.selection("default")[1]].any()
    torch.testing.assert_close(base.outputs(model), together)


# Files.


def test_the_file_holds_indices_values_and_lora_and_loads_in_plain_peft(tmp_path: Path) -> None:
    _, model, method = sdt(torch.float32, channels=6, states=2, pruned=3, r=2)
    nudge(model)
    method.finish(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    found: dict[str, int] = {}
    for name, tensor in tensors.items():
        kind = name.split(".sdt_")[1].split(".")[0]
        found[kind] = found.get(kind, 0) + tensor.numel()
        assert tensor.dtype == (torch.int32 if kind in ("channels", "states", "pruned") else torch.float32)
    assert found == {
        "values": 2 * (6 * 2 + 2 * 4 * 6),
        "channels": 2 * 6,
        "states": 2 * 6 * 2,
        "pruned": 2 * 3,
        "lora_A": 2 * 2 * 64,
        "lora_B": 2 * 2 * 32,
    }
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]) == {"mixer"}
    again = PeftModel.from_pretrained(stock(), str(tmp_path)).eval()
    assert channels_of(again) == channels_of(model)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("kind", "index", "end"), [("channels", 64, 63), ("channels", -1, 63), ("states", 4, 3), ("pruned", 1000, 63)]
)
def test_indices_that_the_model_does_not_have_are_refused(tmp_path: Path, kind: str, index: int, end: int) -> None:
    _, model, _ = sdt(torch.float32, pruned=2)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if f"sdt_{kind}" in name)
    tensors[name].view(-1)[0] = index
    save_file(tensors, path)
    with pytest.raises(RuntimeError, match=rf"sdt_{kind}\S* has indices outside 0 to {end}"):
        PeftModel.from_pretrained(stock(), str(tmp_path))


def test_two_adapters_with_selections_of_their_own_live_on_one_base(tmp_path: Path) -> None:
    expected = {}
    for name, settings in {"a": {"channels": 3, "states": 1}, "b": {"channels": 11, "states": "auto"}}.items():
        _, model, _ = sdt(torch.float32, **settings)
        nudge(model)
        model.save_pretrained(tmp_path / name)
        expected[name] = (logits(model), channels_of(model))
    both = PeftModel.from_pretrained(stock(), str(tmp_path / "a"), adapter_name="a").eval()
    both.load_adapter(str(tmp_path / "b"), "b")
    for name in ("b", "a", "b"):
        both.set_adapter(name)
        assert channels_of(both, name) == expected[name][1]
        assert torch.equal(logits(both), expected[name][0])
    both.delete_adapter("b")
    both.set_adapter("a")
    assert torch.equal(logits(both), expected["a"][0])


# Selection.


def test_taylor_selects_the_channels_that_matter_on_the_calibration_rows() -> None:
    row = Row("sdt", {"channels": 2, "states": 1}, base=tiny.mamba)
    base, method = row.new_base(), row.new_method()
    weak = [channel for channel in range(64) if channel not in (7, 50)]
    for mixer in blocks(base.model).values():
        with torch.no_grad():
            mixer.out_proj.weight[:, weak] *= 0.01
            mixer.x_proj.weight[-8:, weak] *= 0.01
    seen: list[int] = []

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        seen.append(len(batch["input_ids"]))
        return base.loss(model)

    model = method.attach(base.model, base.family, Calibration([[base.batch]] * 30, loss, 30, 60))
    assert channels_of(model) == [[7, 50], [7, 50]]
    assert len(seen) == 3  # a twentieth of the run's steps
    assert all(p.grad is None for p in model.parameters())
    assert "selected (taylor by 3 batches)" in method.notes[0]


def test_the_same_seed_chooses_the_same_and_chance_another() -> None:
    def chosen(selector: str, seed: int) -> list[list[int]]:
        row = Row("sdt", {"selector": selector, "channels": 8}, base=tiny.mamba)
        base, method = row.new_base(), row.new_method()
        torch.manual_seed(seed)
        calibration = Calibration([[base.batch]], lambda model, _: base.loss(model), 1, 3)
        return channels_of(method.attach(base.model, base.family, calibration))

    assert chosen("taylor", 0) == chosen("taylor", 1)
    assert chosen("random", 0) == chosen("random", 0) != chosen("random", 1)
    assert 0 <= maths.jaccard(chosen("random", 0)[0], chosen("random", 1)[0]) < 1


def test_a_selection_is_restored_over_one_of_another_size() -> None:
    _, model, method = sdt(channels=5, states=2, pruned=4)
    state = method.state(model)
    _, other, second = sdt(channels=3, states=1)
    second.restore(other, state)
    assert channels_of(other) == channels_of(model)
    assert other.peft_config["default"].sizes == model.peft_config["default"].sizes
    assert second.state(other).keys() == state.keys()
    assert all(torch.equal(second.state(other)[name], tensor) for name, tensor in state.items())
    shapes = {name: p.shape for name, p in trained(model).items()}
    assert {name: p.shape for name, p in trained(other).items()} == shapes


def test_what_the_report_shows() -> None:
    _, model, method = sdt(channels=5)
    curves, heat = method.figures(model)
    assert len(curves["x"]) == 64
    assert all(sum(row) == pytest.approx(1) for row in curves["y"])
    assert curves["labels"]["series"] == heat["labels"]["y"] == ["layer 0", "layer 1"]
    assert [[i for i, n in enumerate(row) if n] for row in heat["heat"]] == channels_of(model)


# What SDT cannot adapt.


def test_layers_that_differ_are_named() -> None:
    model = stock()
    wider = tiny.mamba_shape(state_size=8)
    model.backbone.layers[1].mixer = MambaMixer(wider, layer_idx=1)
    with pytest.raises(
        UserError, match=r"one shape; here are 64 channels of 4 states \(\S+0\.mixer\), 64 channels of 8"
    ):
        blocks(model)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_state_parameters_that_were_rounded_once_are_found_out(half: torch.dtype) -> None:
    model = stock()
    for mixer in blocks(model).values():
        mixer.A_log.data = mixer.A_log.data.to(half).float()
    with pytest.raises(UserError, match=f"rounded to {str(half).removeprefix('torch.')}"):
        blocks(model)
    for mixer in model.backbone.layers:
        mixer.mixer.A_log.data.zero_()
    assert len(blocks(model)) == 2


def test_a_block_in_half_precision_is_no_place_for_an_adapter() -> None:
    mixer = blocks(stock())["backbone.layers.0.mixer"].bfloat16()
    with pytest.raises(UserError, match=r"needs A_log in float32, and it is torch\.bfloat16"):
        SdtLayer(mixer)
    with pytest.raises(UserError, match="not Linear"):
        SdtLayer(mixer.in_proj)


def test_a_selection_by_hand_reaches_the_states_it_names() -> None:
    base, model, _ = sdt(lora_targets=[])
    layer = layer_of(model)
    layer.choose(
        "default", Selection(torch.tensor([2, 9]), torch.tensor([[0, 3], [1, 2]])), torch.tensor([], dtype=int)
    )
    base.loss(model).backward()
    assert layer.sdt_values["default"]["A_log"].grad.all()
    assert layer.sdt_values["default"]["x_proj"].shape == (8, 2)
