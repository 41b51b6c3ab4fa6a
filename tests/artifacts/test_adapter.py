"""Adapter folders: what is written, and that every doubt at loading is an error with a name."""

from __future__ import annotations

import ast
import json
import shutil

import pytest
import torch
import yaml
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_llama import adapted, lineage_of, tiny
from transformers import AutoModelForCausalLM

from peftcli.artifacts import adapter, card
from peftcli.config.errors import CheckFailed, UserError

IDS = torch.arange(12).reshape(2, 6)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def change(folder, edit) -> None:
    path = folder / adapter.WEIGHTS
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def test_an_adapter_loads_bit_for_bit_with_ours_and_with_plain_peft(saved):
    expected = logits(adapted(tiny()))
    ours = adapter.load(tiny(), saved)
    assert torch.equal(logits(ours), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(), str(saved))), expected)
    assert not any(p.requires_grad for p in ours.parameters())
    trainable = adapter.load(tiny(), saved, is_trainable=True)
    assert {n.split(".")[-3] for n, p in trainable.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_no_file_names_a_path_of_this_machine(saved):
    for path in saved.iterdir():
        assert b"somebody" not in path.read_bytes(), path
    assert json.loads((saved / adapter.CONFIG).read_text())["target_modules"] == ["q_proj", "v_proj"]
    assert json.loads((saved / adapter.LINEAGE).read_text())["base"]["id"] == "tiny"


def test_the_card_says_how_to_load_it_and_what_it_reached(saved):
    text = (saved / "README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained("tiny", revision="abc")' in text
    assert "| tuned | 0.75 |" in text
    assert "licence is not known" in text
    compile(text.split("```python\n")[1].split("```")[0], "card", "exec")


def test_a_truncated_file_is_told_from_a_wrong_one(saved):
    path = saved / adapter.WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckFailed, match=r"adapter-keys: .*bytes\) is truncated or damaged"):
        adapter.load(tiny(), saved)


def test_missing_extra_and_misshapen_tensors_are_errors(saved, tmp_path):
    def edits(tensors):
        return sorted(tensors)[0]

    for name, edit, expected in [
        ("missing", lambda t: t.pop(edits(t)), "1 tensors are missing .*lora_A"),
        ("extra", lambda t: t.update({"base_model.model.x.lora_A.weight": torch.ones(1)}), "1 tensors are unexpected"),
        ("shape", lambda t: t.update({edits(t): torch.ones(8, 31)}), "does not fit this base.*size mismatch"),
    ]:
        folder = shutil.copytree(saved, tmp_path / name)
        change(folder, edit)
        with pytest.raises(CheckFailed, match=f"adapter-keys: .*{expected}"):
            adapter.load(tiny(), folder)


def test_a_missing_replaced_head_is_an_error(tmp_path):
    model = adapted(tiny(), modules_to_save=["lm_head"])
    adapter.save(model, tmp_path / "a", lineage_of(model), {})
    assert torch.equal(logits(adapter.load(tiny(), tmp_path / "a")), logits(model))
    change(tmp_path / "a", lambda t: t.pop("base_model.model.lm_head.weight"))
    with pytest.raises(CheckFailed, match=r"adapter-keys.*lm_head"):
        adapter.load(tiny(), tmp_path / "a")


def test_another_base_is_refused_and_force_is_recorded(saved):
    with pytest.raises(CheckFailed, match=r"base-mismatch: .*trained on tiny@abc, and 4 of its 4") as failed:
        adapter.load(tiny(seed=1), saved)
    assert "--force" in failed.value.hint
    assert len(adapter.load(tiny(seed=1), saved, force=True).forced_base) == 4
    almost = tiny()
    almost.model.layers[1].self_attn.q_proj.weight.data[3, 5] += 0.1
    with pytest.raises(CheckFailed, match=r"1 of its 4 .*the first: model.layers.1.self_attn.q_proj.weight"):
        adapter.load(almost, saved)


def test_the_same_base_in_bfloat16_is_the_same_base(saved):
    assert adapter.load(tiny(dtype=torch.bfloat16), saved).forced_base == []


def test_pickled_weights_are_never_read(saved):
    weights = saved / adapter.WEIGHTS
    torch.save(load_file(weights), saved / "adapter_model.bin")
    adapter.load(tiny(), saved)
    weights.unlink()
    with pytest.raises(CheckFailed, match=r"unsafe-weights: .*adapter_model\.bin"):
        adapter.load(tiny(), saved)
    (saved / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        adapter.load(tiny(), saved)


def test_folders_that_hold_no_adapter(tmp_path, saved):
    with pytest.raises(UserError, match="holds no adapter"):
        adapter.load(tiny(), tmp_path / "nothing")
    config = saved / adapter.CONFIG
    config.write_text(config.read_text().replace("LORA", "LORQ"))
    with pytest.raises(UserError, match="unknown adapter type 'LORQ'") as failed:
        adapter.load(tiny(), saved)
    assert failed.value.mistakes[0].nearest == "LORA"
    assert "register_with_peft" in failed.value.mistakes[0].hint
    config.write_text("{")
    with pytest.raises(UserError, match="is not an adapter's config"):
        adapter.load(tiny(), saved)


def test_a_save_that_fails_keeps_the_earlier_adapter(saved, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    monkeypatch.setattr("peft.peft_model.safe_save_file", fail)
    model = adapted(tiny(), scale=0.5)
    with pytest.raises(CheckFailed, match="disk-full"):
        adapter.save(model, saved, lineage_of(model), {})
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_prompt_learning_is_held_to_the_whole_base(tmp_path, kind):
    model = get_peft_model(tiny(), kind(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    adapter.save(model, tmp_path / "a", lineage_of(model), {})
    assert torch.equal(logits(adapter.load(tiny(), tmp_path / "a")), logits(model))
    other = tiny()
    other.model.layers[0].mlp.up_proj.weight.data.add_(1)
    with pytest.raises(CheckFailed, match="base-mismatch"):
        adapter.load(other, tmp_path / "a")


def test_a_whole_model_round_trips_and_its_faults_are_named(tmp_path):
    model, folder = tiny(), tmp_path / "model"
    lineage = lineage_of(adapted(tiny()))
    adapter.save_model(model, None, folder, lineage, {"tuned": {"loss": 1.5}})
    assert torch.equal(logits(adapter.load_model(AutoModelForCausalLM, folder)), logits(model))
    assert model.config._name_or_path == "/home/somebody/models/tiny"
    assert all(b"somebody" not in path.read_bytes() for path in folder.iterdir())
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if "norm" not in k}, weights, metadata={"format": "pt"})
    with pytest.raises(CheckFailed, match=r"adapter-keys: .*5 tensors are missing"):
        adapter.load_model(type(model), folder)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckFailed, match="truncated"):
        adapter.load_model(type(model), folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckFailed, match="unsafe-weights"):
        adapter.load_model(type(model), folder)


@pytest.mark.parametrize("base", ["null", "1e3", 'a"b: {c}', "org/name"])
def test_the_card_keeps_any_name_of_a_base_as_text(base):
    model = adapted(tiny())
    lineage = lineage_of(model)
    lineage = lineage | {"base": lineage["base"] | {"id": base, "revision": "0123"}, "method": "no"}
    text = card.adapter(lineage, "LORA", "LlamaForCausalLM", {})
    _, matter, rest = text.split("---\n")
    assert yaml.safe_load(matter)["base_model"] == base
    assert yaml.safe_load(matter)["tags"] == ["peftcli", "no"]
    code = ast.parse(rest.split("```")[1].removeprefix("python\n"))
    (call,) = [n for n in ast.walk(code) if isinstance(n, ast.Call) and len(n.args) == 1 and n.keywords]
    assert [call.args[0].value, call.keywords[0].value.value] == [base, "0123"]
