"""`peft data` on a recipe, files and a tokenizer of our own: what it counts, shows and warns of."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peftcli.cli.main import app

RECIPE = """
defaults:
  - model: smollm2-135m
  - method: lora
  - task: classification
  - optim: adamw
  - training: default
  - _self_
schema_version: 1
name: mine
model: {source: folder, name: tokenizer}
method: {targets: [attention.q]}
data:
  source: files
  files: {train: train.jsonl, test: test.csv}
  columns: {text: body}
  validation_share: 0.2
task: {prompt: "{text} is", max_length: 12}
"""
WORDS = [f"w{i}" for i in range(200)]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))
    rng = random.Random(0)
    rows = [{"body": " ".join(rng.choices(WORDS, k=8)), "label": ["good", "bad"][i % 4 == 0]} for i in range(40)]
    rows[9]["body"] += " " + " ".join(rng.choices(WORDS, k=30))
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"body": " ", "label": "bad"}]))
    leaked, torn = rows[3]["body"], rows[4]["body"]
    Path("test.csv").write_text(f"body,label\n{leaked},good\n{torn},good\nw1 w2 w3 w4,bad\n")
    Path("mine.yaml").write_text(RECIPE)
    tokenizer()


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "?", "is", "good", "bad", *WORDS])}, "?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="?").save_pretrained("tokenizer")
    LlamaConfig(vocab_size=205, hidden_size=32, num_hidden_layers=2).save_pretrained("tokenizer")


def run(*args: str):
    return CliRunner().invoke(app, ["data", "mine.yaml", *args])


def test_json_has_counts_balance_lengths_duplicates_and_rows():
    result = run("--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {split: about["rows"] for split, about in found["splits"].items()} == {
        "train": 32,
        "validation": 8,
        "test": 3,
    }
    assert found["splits"]["validation"]["labels"] == {"good": 6, "bad": 2}
    assert found["skipped"] == {"train": {"body is empty": 1}}
    tokens = found["tokens"]
    assert tokens["train"]["truncated"] + tokens["validation"]["truncated"] == 1
    assert tokens["test"]["lengths"]["total"] == 9 + 9 + 5
    assert tokens["train"]["trained_tokens"] == 32
    leaked = {(t["split"], t["against"]): t["equal"] for t in found["duplicates"]}
    assert leaked["test", "train"] + leaked["test", "validation"] == 2
    assert len(found["shown"]) == 3
    assert found["shown"][0].endswith(" is[[good]]") or found["shown"][0].endswith(" is[[bad]]")


def test_plain_text_names_leaks_contradictions_and_what_would_stop_training():
    result = run("data.validation_share=0")
    assert result.exit_code == 0, result.output
    assert "leak: 2 of 3 test rows read the same as a training row" in result.output
    assert "same text, different labels: 1 texts in 2 rows" in result.output
    assert "train row 4 'bad', test row 1 'good'" in result.output
    assert "left out of train: 1 (body is empty)" in result.output
    assert "peft train stops at the rows left out here" in result.output
    assert "│" not in result.output
    assert "peft train stops" not in run("data.bad_rows=skip").output


def test_what_would_stop_training_is_said_after_the_tables_with_its_exit_code():
    Path("test.csv").write_text("body,label\na b c,ugly\n")
    result = run()
    assert result.exit_code == 1
    assert "Texts that come twice" in result.output
    assert "'ugly' (1 rows)" in result.output


def test_without_a_tokenizer_the_rest_is_still_counted():
    result = run("model.name=elsewhere")
    assert result.exit_code == 2
    assert "Lengths of train in words" in result.output
    assert "elsewhere" in result.output


def test_mistakes_in_columns_and_keys_exit_with_two():
    result = run("data.columns={text: boddy}")
    assert result.exit_code == 2
    assert "did you mean: body" in result.output
    assert run("data.colums=x").exit_code == 2


def test_a_stream_is_looked_at_from_its_beginning():
    result = run("data.streaming=true", "training.max_steps=3", "data.validation_share=0", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["splits"]["train"]["rows"] == 40


def test_labels_that_are_scored_by_a_part_of_their_word_are_named():
    assert "scored by the first token" not in run().output
    found = run("task.labels.good='good w1'").output
    assert "a label is scored by the first token of its word" in found
    assert "'good' by 'good'" in " ".join(found.split())
    assert "'bad' by" not in found
