"""Adapter folders: what is written, and that every doubt at loading is an error with a name."""

from __future__ import annotations

import ast
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_llama import adapted, lineage_of, run_config, tiny
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from peftcli.artifacts import adapter, card, lineage
from peftcli.artifacts.merge import merged_in_float32
from peftcli.config.errors import CheckFailed, UserError
from peftcli.config.schema import ClassificationConfig, GenerationConfig, ModelConfig

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
    assert "The licence of the base model is not known" in text
    assert '- prompt: `"{text}"`' in text
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
    about = lineage_of(adapted(tiny()))
    adapter.save_model(model, None, folder, about, {"tuned": {"loss": 1.5}})
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
    about = lineage_of(model)
    about = about | {"base": about["base"] | {"id": base, "revision": "0123"}, "method": "no"}
    text = card.adapter(about, "LORA", "LlamaForCausalLM", {})
    _, matter, rest = text.split("---\n")
    assert yaml.safe_load(matter)["base_model"] == base
    assert yaml.safe_load(matter)["tags"] == ["peftcli", "no"]
    code = ast.parse(rest.split("```")[1].removeprefix("python\n"))
    calls = [n for n in ast.walk(code) if isinstance(n, ast.Call) and len(n.args) == 1 and n.keywords]
    named = [n for n in calls if n.keywords[0].arg == "revision"]
    assert [[call.args[0].value, call.keywords[0].value.value] for call in named] == [[base, "0123"]] * 2


@pytest.fixture
def sample(checkpoint, tmp_path, monkeypatch) -> Path:
    """The tiny checkpoint as a fetched sample of that name."""
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(checkpoint, tmp_path / "cache/samples/tiny-sample")
    (folder / "sample.json").write_text('{"licence": "Apache-2.0"}')
    (folder / "complete").touch()
    return folder


def ran(folder: Path, monkeypatch, capsys) -> str:
    """What a card's Python prints, run as it stands."""
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(compile((folder / "README.md").read_text().split("```python\n")[1].split("```")[0], "card", "exec"), {})
    return capsys.readouterr().out.splitlines()[-1]


TASKS = [
    ClassificationConfig(prompt="{text} Sentiment:", labels={"0": "bad"}),
    ClassificationConfig(prompt="{text} Sentiment:", head="linear"),
    GenerationConfig(prompt="{text} Sentiment: ", completion="{label}", max_new_tokens=3),
]


@pytest.mark.parametrize("task", TASKS, ids=["words", "linear", "generation"])
def test_the_cards_of_adapter_and_model_run_as_printed_and_ask_as_in_training(
    sample, tmp_path, monkeypatch, capsys, task
):
    auto = AutoModelForSequenceClassification if getattr(task, "head", "") == "linear" else AutoModelForCausalLM
    torch.manual_seed(0)
    words, base = AutoTokenizer.from_pretrained(sample), auto.from_pretrained(sample)
    kind = "SEQ_CLS" if auto is AutoModelForSequenceClassification else "CAUSAL_LM"
    model = adapted(base, task_type=kind)
    config = replace(run_config(), model=ModelConfig("tiny-sample", source="sample"), task=task)
    more = {"labels": ["0", "1"], "label_tokens": [7, 9]} if task.type == "classification" else {}
    about = lineage.collect(model, config, base_id="tiny-sample", revision=None, data_fingerprint="f00d", **more)
    adapter.save(model, tmp_path / "a", about, {})
    ids = words("YOUR text Sentiment:", return_tensors="pt").input_ids
    with torch.no_grad():
        if task.type == "generation":
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
            expected = words.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
        else:
            scores = model(input_ids=ids).logits[0]
            expected = str(
                (scores if auto is AutoModelForSequenceClassification else scores[-1, [7, 9]]).argmax().item()
            )
    assert ran(tmp_path / "a", monkeypatch, capsys) == expected
    adapter.save_model(merged_in_float32(model), words, tmp_path / "m", about, {})
    assert ran(tmp_path / "m", monkeypatch, capsys) == expected
    for folder in (tmp_path / "a", tmp_path / "m"):
        text = (folder / "README.md").read_text()
        assert "Licence of the base model: Apache-2.0. The licence of the training data is not known." in text
        assert json.loads((folder / adapter.LINEAGE).read_text())["task"]["prompt"] == task.prompt
    assert ("0 (bad), 1" in text) == bool(getattr(task, "labels", {}))
    assert "peft samples fetch tiny-sample" in (tmp_path / "a/README.md").read_text()


def test_the_card_does_not_give_out_a_folder_as_a_hub_name():
    about = lineage_of(adapted(tiny()))
    about["base"] |= {"source": "folder", "id": "mine"}
    text = card.adapter(about, "LORA", "LlamaForCausalLM", {})
    assert 'from_pretrained("THE FOLDER OF THE BASE")' in text
    assert 'from_pretrained("mine"' not in text
