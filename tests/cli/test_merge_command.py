"""`peft merge`: what it writes answers like the adapter in anyone's script; what it cannot do leaves nothing behind."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


@pytest.fixture
def copy(tmp_path):
    """A copy of a run's folder, to be changed."""
    return lambda run: shutil.copytree(run.path, tmp_path / run.name)


def outputs(auto, folder: Path, adapter: Path | None, labels: int | None = None) -> torch.Tensor:
    """What a stranger's script computes, with the merged folder or with plain PEFT on the base."""
    more = {"num_labels": labels} if labels and adapter else {}
    words = AutoTokenizer.from_pretrained(folder)
    model = auto.from_pretrained(folder, dtype=torch.float32, **more)
    model.config.pad_token_id = words.pad_token_id
    if adapter:
        from peft import PeftModel

        import peftcli

        peftcli.register_with_peft()
        model = PeftModel.from_pretrained(model, str(adapter))
    batch = words(["the film was good Sentiment:", "a bad plot Sentiment:"], return_tensors="pt", padding=True)
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize(
    ("kind", "auto"),
    [
        ("words", AutoModelForCausalLM),
        ("pissa", AutoModelForCausalLM),
        ("linear", AutoModelForSequenceClassification),
        ("probe", AutoModelForSequenceClassification),
    ],
)
def test_the_merged_folder_answers_like_the_adapter_without_peft(peft, trained, checkpoint, tmp_path, kind, auto):
    run, to = trained(kind), tmp_path / "merged"
    result = peft("merge", run.path, "--to", to, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    for drift in (found["merge"], found["reload"]):
        assert drift["share"] < 1e-4
        assert drift["agreement"] == 1
        assert drift["effect"] > 100 * drift["mean"]
    assert (found["rows"], found["source"]) == (16, "rows of the test split")
    for card in (run.adapter / "README.md", to / "README.md"):
        told = card.read_text()
        assert ("first = {" if auto is AutoModelForCausalLM else "print(labels[") in told
    merged = outputs(auto, to, None)
    assert torch.allclose(merged, outputs(auto, checkpoint, run.adapter, labels=2), atol=1e-4)
    if auto is AutoModelForSequenceClassification:
        assert auto.from_pretrained(to).config.id2label == {0: "bad", 1: "good"}
    else:
        assert not torch.allclose(merged, outputs(auto, checkpoint, None), atol=1e-2)
    assert not list(to.glob("adapter*"))


def test_a_merge_measures_as_the_run_did(peft, trained, tmp_path, rows):
    """The merged folder as a base of its own gives the run's answers."""
    assert peft("merge", trained("generation").path, "--to", tmp_path / "merged").exit_code == 0
    told = {example["row"]: example["tuned"] for example in trained("generation").read_report()["examples"]}
    model, words = (auto.from_pretrained(tmp_path / "merged") for auto in (AutoModelForCausalLM, AutoTokenizer))
    asked = [json.loads(line)["text"] for line in Path(rows["test"]).read_text().splitlines()]
    for row, expected in told.items():
        ids = words(f"{asked[row]} Sentiment:", return_tensors="pt")
        out = model.generate(ids["input_ids"], attention_mask=ids["attention_mask"], max_new_tokens=4, do_sample=False)
        assert words.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip() == expected


@pytest.mark.parametrize(("chosen", "dtype"), [("same", torch.bfloat16), ("fp32", torch.float32)])
def test_the_type_is_that_of_training_or_the_one_asked_for(peft, trained, tmp_path, chosen, dtype):
    result = peft("merge", trained("words in bf16").path, "--to", tmp_path / "merged", "--dtype", chosen)
    assert result.exit_code == 0, result.output
    assert "same highest" in result.output
    assert re.search(r"all \d+ tokens at 128 positions, the last of each row, of 16 rows of the test", result.output)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == dtype


def test_beyond_the_tolerance_nothing_is_left_behind(peft, trained, copy, tmp_path):
    folder = copy(trained("words"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["training"]["merge_tolerance"] = 1e-9
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    before = sorted(tmp_path.rglob("*"))
    result = peft("merge", folder, "--to", tmp_path / "merged")
    assert result.exit_code == 1
    assert "merge-drift" in result.output
    assert sorted(tmp_path.rglob("*")) == before


def test_without_the_rows_the_texts_of_the_report_serve(peft, trained, copy, tmp_path):
    folder = copy(trained("words"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"]["files"] = {"train": "gone.jsonl", "test": "gone too.jsonl"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    result = peft("merge", folder, "--to", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    assert "16 texts of the run's report" in result.output
    assert "no file gone too.jsonl" in result.output


def test_only_an_earlier_merge_is_replaced_and_only_when_asked(peft, trained, tmp_path):
    to, other = tmp_path / "merged", tmp_path / "home"
    other.mkdir()
    (other / "letter.txt").touch()
    result = peft("merge", trained("words").path, "--to", other, "--overwrite")
    assert result.exit_code == 2
    assert "no earlier merge" in result.output
    assert (other / "letter.txt").exists()
    assert peft("merge", trained("words").path, "--to", to).exit_code == 0
    result = peft("merge", trained("words").path, "--to", to)
    assert result.exit_code == 2
    assert "--overwrite" in result.output
    assert peft("merge", trained("pissa").path, "--to", to, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("kind", "told"),
    [("full", "trained a whole model"), ("prompt", "PROMPT_TUNING is no change of the base's weights")],
)
def test_what_does_not_merge_says_so(peft, trained, tmp_path, kind, told):
    result = peft("merge", trained(kind).path, "--to", tmp_path / "merged")
    assert result.exit_code == 2
    assert told in result.output
    assert not (tmp_path / "merged").exists()
