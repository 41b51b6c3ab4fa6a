"""Merging keeps what the adapter does, within bounds for each dtype, and says so where it does not."""

from __future__ import annotations

import json

import pytest
import torch
from peft import IA3Config, PromptTuningConfig, get_peft_model
from tiny_llama import adapted, lineage_of, tiny
from transformers import AutoModelForCausalLM

from peftcli.artifacts import adapter, merge
from peftcli.config.errors import CheckFailed, UserError

IDS = torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0
MASK[1, 9:] = 0
PROBES = [{"input_ids": IDS[:2], "attention_mask": MASK[:2]}, {"input_ids": IDS[2:], "attention_mask": MASK[2:]}]
# Rounding of a weight is at most 2^-9 of it in bfloat16 and 2^-12 in float16; two layers and the head add up.
BOUNDS = {torch.float32: 1e-5, torch.float16: 0.003, torch.bfloat16: 0.02}


def merged(model, folder, **more):
    return merge.merge(model, None, PROBES, folder, lineage_of(model), **more)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_drift_stays_within_the_bound_of_its_dtype(tmp_path, dtype, settings):
    report = merged(adapted(tiny(dtype=dtype), **settings), tmp_path / "m", tolerance=BOUNDS[dtype])
    for drift in (report["merge"], report["reload"]):
        assert drift["share"] <= BOUNDS[dtype]
        assert drift["effect"] > 0.05 * drift["spread"]
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert stored.dtype == dtype
    assert json.loads((tmp_path / "m/lineage.json").read_text())["merged"] == report
    assert all(b"somebody" not in path.read_bytes() for path in (tmp_path / "m").iterdir())


def test_the_sum_is_rounded_once(tmp_path):
    exact = adapted(tiny(dtype=torch.bfloat16))
    layer = exact.base_model.model.model.layers[0].self_attn.q_proj
    expected = (layer.base_layer.weight.float() + layer.get_delta_weight("default").float()).bfloat16()
    result = merge.merged_in_float32(adapted(tiny(dtype=torch.bfloat16)))
    assert torch.equal(result.model.layers[0].self_attn.q_proj.weight, expected)
    assert result.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_a_float32_merge_can_be_saved_smaller(tmp_path):
    report = merged(adapted(tiny()), tmp_path / "m", dtype=torch.bfloat16)
    assert report["dtype"] == "bfloat16"
    assert adapter.load_model(AutoModelForCausalLM, tmp_path / "m").dtype == torch.bfloat16
    assert 1e-4 < report["reload"]["share"] < BOUNDS[torch.bfloat16]


def test_a_saved_model_that_is_the_base_is_caught_and_not_left_behind(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/old").touch()
    real = adapter.write_model
    monkeypatch.setattr(adapter, "write_model", lambda model, tokenizer, folder: real(tiny(), tokenizer, folder))
    with pytest.raises(CheckFailed, match=r"merge-drift: outputs of the saved model .*most of its effect is lost"):
        merged(adapted(tiny()), tmp_path / "m", tolerance=10)
    assert [path.name for path in tmp_path.rglob("*")] == ["m", "old"]


def test_an_adapter_lost_in_rounding_is_caught_though_the_tolerance_would_allow_it(tmp_path):
    with pytest.raises(CheckFailed, match=r"merge-drift.*effect is lost") as failed:
        merged(adapted(tiny(), scale=0.0005), tmp_path / "m", dtype=torch.bfloat16)
    assert "--dtype fp32" in failed.value.hint
    assert merged(adapted(tiny(), scale=0.0005), tmp_path / "m")["merge"]["effect"] > 0


def test_an_adapter_without_any_effect_is_no_model_of_its_own(tmp_path):
    with pytest.raises(CheckFailed, match="merge-drift: the adapter does not change the outputs at all"):
        merged(adapted(tiny(), scale=0), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_merging_draws_no_progress_bars(tmp_path, capfd):
    merged(adapted(tiny()), tmp_path / "m")
    assert "Writing model shards" not in capfd.readouterr().err


def test_one_bad_position_is_beyond_the_tolerance():
    tuned = torch.randn(200, 10, generator=torch.Generator().manual_seed(0))
    off = tuned.clone()
    off[7] += 1
    drift = merge.compare(off, tuned, torch.zeros_like(tuned))
    assert drift.mean == pytest.approx(1 / 200)
    with pytest.raises(CheckFailed, match="worst position by"):
        merge.check(drift, 0.05, "merged", torch.float32)
    with pytest.raises(CheckFailed):
        merge.check(merge.compare(tuned * torch.nan, tuned, tuned), 0.05, "merged", torch.float32)


def test_padding_on_either_side_is_not_compared():
    model = tiny().eval()
    assert merge.outputs(model, PROBES).shape == (7 + 8 + 8 + 8, 64)
    garbage = [{**probe, "input_ids": probe["input_ids"] * probe["attention_mask"]} for probe in PROBES]
    assert torch.allclose(merge.outputs(model, garbage), merge.outputs(model, PROBES), atol=1e-6)


def test_other_methods_merge_or_say_that_they_cannot(tmp_path):
    ia3 = get_peft_model(tiny(), IA3Config(task_type="CAUSAL_LM"))
    for name, parameter in ia3.named_parameters():
        if "ia3" in name:
            parameter.data.mul_(1.5)
    assert merged(ia3, tmp_path / "m")["merge"]["share"] < 1e-5
    prompt = get_peft_model(tiny(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UserError, match="PROMPT_TUNING cannot be merged"):
        merged(prompt, tmp_path / "p")
    broken = adapted(tiny())
    broken.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(CheckFailed, match="merge-drift: the merged weights are not finite"):
        merged(broken, tmp_path / "n")
    with pytest.raises(UserError, match="there are none"):
        merge.merge(adapted(tiny()), None, [], tmp_path / "x", {})


def test_a_forced_base_is_on_record(tmp_path, saved):
    model = adapter.load(tiny(seed=1), saved, force=True)
    lineage = json.loads((saved / "lineage.json").read_text())
    report = merge.merge(model, None, PROBES, tmp_path / "m", lineage)
    assert len(report["forced_base"]) == 4
    assert json.loads((tmp_path / "m/lineage.json").read_text())["merged"]["forced_base"] == report["forced_base"]
