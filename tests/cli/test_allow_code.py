"""`--allow-code`: programs that a model has written are run where the command line says so, and nowhere else."""

from __future__ import annotations

import json
import os
import sys

import pytest

from peftcli.config import permission
from tests.cli.conftest import write_recipe

ROWS = [
    {"problem": "one", "program": "n = 1", "tests": ["assert n == 1"]},
    {"problem": "two", "program": "n = 2", "tests": ["assert n == 2", "assert n != 1"]},
    {"problem": "three", "program": "n = 3", "tests": ["assert n == 4"]},
]
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the cage is made for Linux")


@pytest.fixture
def mbpp(checkpoint, tmp_path):
    """A recipe whose model learns three programs by heart; the tests of the third are wrong."""
    files = {split: tmp_path / f"{split}.jsonl" for split in ("train", "validation", "test")}
    for path in files.values():
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return write_recipe(
        checkpoint, {split: str(path) for split, path in files.items()}, tmp_path,
        method={"name": "lora", "r": 8, "alpha": 16, "targets": ["all"]},
        task={
            "type": "generation", "scoring": "code", "prompt": "{problem}: {tests}\n", "completion": "{program}",
            "tests": "{tests}", "max_new_tokens": 8, "generated_rows": 3,
        },
        training={"max_steps": 60, "batch_size": 3, "eval_every": "end", "precision": "fp32"},
    )  # fmt: skip


@ON_LINUX
def test_programs_are_run_where_it_is_allowed(peft, mbpp, made, tmp_path):
    result = peft("train", mbpp, "--allow-code", "--quiet", "task.best_metric=pass_at_1")
    assert result.exit_code == 0, result.output
    assert permission.VARIABLE not in os.environ
    report = made().read_report()
    tuned = next(row for row in report["quality"]["rows"] if row["name"] == "tuned")
    assert tuned["metrics"]["pass_at_1"] == pytest.approx(2 / 3)
    right = {example["expected"]: example["correct"] for example in report["examples"]}
    assert right == {"n = 1": True, "n = 2": True, "n = 3": False}

    answers = tmp_path / "answers.jsonl"
    result = peft("eval", made().path, "--allow-code", "--json", "--predictions", answers)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["difference"]["pass_at_1"] == 0.0
    told = {row["expected"]: row["remark"] for row in map(json.loads, answers.read_text().splitlines())}
    assert told == {"n = 1": "", "n = 2": "", "n = 3": "failed: AssertionError: assert n == 4"}

    result = peft("eval", made().path)
    assert result.exit_code == 2
    assert "--allow-code" in result.output
    result = peft("eval", made().path, "task.best_metric=loss", "--json")
    found = json.loads(result.stdout)
    assert "pass_at_1" not in found["quality"]["rows"][-1]["metrics"]
    assert any("--allow-code" in note for note in found["notes"])


def test_without_it_training_does_not_begin(peft, mbpp, tmp_path, monkeypatch):
    monkeypatch.setenv(permission.VARIABLE, "1")  # only the command line counts
    result = peft("train", mbpp, "task.best_metric=pass_at_1")
    assert result.exit_code == 2, result.output
    assert "runs Python programs as the model writes them" in result.output
    assert "--allow-code" in result.output
    assert not (tmp_path / "runs").exists()


def test_a_recipe_cannot_allow_it(peft, mbpp):
    for key in ("task.allow_code=true", "allow_code=true"):
        assert peft("train", mbpp, key).exit_code == 2


def test_without_it_the_loss_can_be_learnt_and_a_note_says_what_is_missing(peft, mbpp, made):
    result = peft("train", mbpp, "training.max_steps=2")
    assert result.exit_code == 0, result.output
    report = made().read_report()
    assert any("--allow-code" in note for note in report["data"]["notes"])
    metrics = report["quality"]["rows"][-1]["metrics"]
    assert "pass_at_1" not in metrics
    assert "exact_match" in metrics


@ON_LINUX
def test_it_must_be_said_again_to_resume(peft, mbpp, made):
    from peftcli.artifacts.run_folder import RunFolder
    from peftcli.config.compose import compose

    composed = compose(str(mbpp), ["task.best_metric=pass_at_1", "training.max_steps=2"])
    RunFolder.create(composed.config, composed.overrides)
    refused = peft("train", "--resume", made().path)
    assert refused.exit_code == 2
    assert "--allow-code" in refused.output
