"""LoRA: targets by role, brief and exact in the file; rearranged bases put back; settings that exclude each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from peftcli.config.errors import CheckFailed, UserError
from peftcli.methods.injection import compact
from peftcli.methods.lora.settings import Settings
from peftcli.methods.lora.tuner import Method
from peftcli.testing.rows import Row, nudge, trained
from peftcli.testing.tiny import llama


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ([], ["q_proj", "v_proj"]),
        (["attention"], ["k_proj", "o_proj", "q_proj", "v_proj"]),
        (["mlp.up", "head"], ["lm_head", "up_proj"]),
        ([r".*\.1\..*q_proj"], ["model.layers.1.self_attn.q_proj"]),
    ],
)
def test_the_file_names_the_targets_briefly_and_exactly(
    targets: list[str], expected: list[str], tmp_path: Path
) -> None:
    _, model, _ = Row("lora", {"targets": targets}).attached()
    model.save_pretrained(tmp_path)
    assert sorted(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]) == expected


def test_an_ending_that_would_match_more_is_not_used() -> None:
    from peft import LoraConfig

    base = llama()
    base.model.model.layers[0].mlp.q_proj = torch.nn.Linear(2, 2)
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    assert compact(base.model, LoraConfig(), names) == ["self_attn.q_proj"]
    base.model.model.layers[1].mlp.self_attn = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(2, 2)})
    assert compact(base.model, LoraConfig(), names) == names


def test_dead_target() -> None:
    base = llama()
    with pytest.raises(CheckFailed, match="dead-target"):
        Method(Settings(targets=["attention.w"])).attach(base.model, base.family)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_rearranged_base_comes_back_and_outputs_stay(init: str, rslora: bool) -> None:
    row = Row("lora", {"r": 4, "alpha": 12.0, "init": init, "use_rslora": rslora}, dtype=torch.float32)
    untouched, model, method = row.attached()
    name = "model.layers.0.self_attn.q_proj"
    expected = untouched.model.get_submodule(name).weight
    inside = model.get_base_model().get_submodule(name)
    assert not torch.allclose(inside.base_layer.weight, expected, atol=1e-3)
    nudge(model)
    before = untouched.outputs(model)
    method.finish(model)
    assert torch.equal(inside.base_layer.weight, expected)
    torch.testing.assert_close(untouched.outputs(model), before, rtol=1e-4, atol=1e-4)
    config = model.peft_config["default"]
    assert (config.r, config.init_lora_weights) == (8, True)
    assert inside.scaling["default"] == pytest.approx(config.lora_alpha / (8**0.5 if rslora else 8))
    method.finish(model)
    assert config.r == 8


@pytest.mark.parametrize("more", [{"use_dora": True}, {"dropout": 0.1}, {"bias": "all"}])
def test_what_cannot_be_written_as_an_update_is_refused(more: dict[str, object]) -> None:
    base = llama(torch.float32)
    with pytest.raises(UserError, match=r"method\.init=pissa"):
        Method(Settings(init="pissa", **more)).attach(base.model, base.family)


def test_what_peft_refuses_is_the_users_mistake() -> None:
    base = llama(torch.float32)
    with pytest.raises(UserError, match=r"LORA cannot be put into this model.*even"):
        Method(Settings(init="orthogonal", r=3)).attach(base.model, base.family)


def test_the_same_seed_draws_the_same_adapter() -> None:
    first, second = (trained(Row("lora").attached()[1]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
