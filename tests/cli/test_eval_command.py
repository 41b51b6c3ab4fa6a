"""`peft eval`: the numbers of the report come back digit for digit, and other rows are told apart from the run's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

KINDS = [
    "words",
    "words in bf16",
    "linear",
    "linear in bf16",
    "probe",
    "pissa",
    "full",
    "prompt",
    "generation",
    "shots and beams",
]


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def rows_of(found: dict) -> dict[str, dict]:
    return {row["name"]: row["metrics"] for row in found["quality"]["rows"]}


@pytest.fixture
def copy(tmp_path):
    """A copy of a run's folder, to be damaged."""
    return lambda run: shutil.copytree(run.path, tmp_path / run.name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reloaded_run_has_the_numbers_of_its_report(peft, trained, kind):
    run = trained(kind)
    before = contents(run.path)
    result = peft("eval", run.path, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["own_rows"]
    assert found["split"] == "test"
    assert rows_of(found)["tuned"] == rows_of(run.read_report())["tuned"] == found["reported"]
    assert set(found["difference"].values()) == {0.0}
    assert contents(run.path) == before


@pytest.mark.parametrize("kind", ["words", "generation"])
def test_the_base_and_the_baselines_come_back_too(peft, trained, kind):
    found = json.loads(peft("eval", trained(kind).path, "--baselines", "--json").stdout)
    assert rows_of(found) == rows_of(trained(kind).read_report())
    quality = dict(trained(kind).read_report()["quality"])
    assert {key: found["quality"][key] for key in quality} == quality
    if kind == "words":
        assert rows_of(found)["untouched base"] != rows_of(found)["tuned"]


def test_the_base_of_a_whole_model_is_loaded_for_the_comparison(peft, trained):
    base = rows_of(json.loads(peft("eval", trained("full").path, "--json").stdout))["untouched base"]
    assert base == rows_of(json.loads(peft("eval", trained("words").path, "--json").stdout))["untouched base"]


def test_a_person_reads_a_table_and_that_the_numbers_agree(peft, trained):
    result = peft("eval", trained("words").path)
    assert "test split, 16 rows" in result.output
    assert "untouched base" in result.output
    assert "digit for digit" in result.output


def test_the_adapters_folder_leads_to_its_run(peft, trained):
    assert peft("eval", trained("words").adapter, "--json").exit_code == 0
    assert peft("eval", trained("full").model, "--json").exit_code == 0


def test_other_rows_need_neither_the_training_rows_nor_their_order_of_labels(peft, trained, copy, tmp_path):
    folder = copy(trained("words"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"]["files"] = {"train": "gone.jsonl", "test": "gone too.jsonl"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    other = tmp_path / "other.csv"
    other.write_text("text,label\nthe film was good,good\nthe plot was good,good\n")
    out = tmp_path / "found.json"
    result = peft("eval", folder, f"data.files.test={other}", "--json", "--output", out)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert not found["own_rows"]
    assert found["difference"] == {}
    assert found["quality"]["rows_measured"] == 2
    examples = json.loads(out.read_text())["examples"]
    assert [example["expected"] for example in examples] == ["good", "good"]
    assert rows_of(found)["tuned"]["accuracy"] == sum(example["correct"] for example in examples) / 2
    other.write_text("text,label\nthe film was good,splendid\n")
    result = peft("eval", folder, f"data.files.test={other}")
    assert result.exit_code == 1
    assert "label-mismatch" in result.output
    result = peft("eval", folder)
    assert result.exit_code == 2
    assert "gone.jsonl" in result.output


def test_changed_rows_are_not_compared_with_the_report(peft, trained, copy, rows, tmp_path):
    folder = copy(trained("words"))
    changed = tmp_path / "changed.jsonl"
    changed.write_text("".join(Path(rows["test"]).read_text().splitlines(keepends=True)[1:]))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"]["files"]["test"] = str(changed)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    result = peft("eval", folder)
    assert "rows have changed" in result.output
    assert "digit for digit" not in result.output


def test_validation_and_training_rows_can_be_measured(peft, trained):
    found = json.loads(peft("eval", trained("words").path, "--split", "validation", "--json").stdout)
    assert found["quality"]["rows_measured"] == 12
    assert found["reported"] == {}
    measured = [row["validation"] for row in trained("words").metrics() if "validation" in row]
    assert rows_of(found)["tuned"] in measured
    assert json.loads(peft("eval", trained("words").path, "--split", "train", "--json").stdout)["own_rows"]


def test_another_base_is_refused_unless_forced(peft, trained, checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(checkpoint, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({name: 1.5 * tensor for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    result = peft("eval", trained("words").path, f"model.name={other}")
    assert result.exit_code == 1
    assert "base-mismatch" in result.output
    result = peft("eval", trained("words").path, f"model.name={other}", "--force", "--json")
    assert result.exit_code == 0
    assert len(json.loads(result.stdout)["forced_base"]) == len(
        json.loads((trained("words").adapter / "lineage.json").read_text())["base"]["tensors"]
    )


def test_a_run_that_has_not_ended_names_the_command_that_ends_it(peft, make_run):
    run = make_run()
    result = peft("eval", run.path)
    assert result.exit_code == 2
    assert f"peft train --resume {run.path}" in result.output


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("method.r=4", "make it another run"),
        ("data.filess.test=x", "did you mean: data.files"),
        ("data.files.test=nowhere.jsonl", "no file nowhere.jsonl"),
    ],
)
def test_overrides_that_cannot_be_are_mistakes(peft, trained, override, told):
    result = peft("eval", trained("words").path, override)
    assert result.exit_code == 2
    assert told in result.output


def test_an_unsafe_or_damaged_adapter_is_not_loaded(peft, trained, copy):
    folder = copy(trained("words"))
    weights = folder / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "adapter-keys" in peft("eval", folder).output
    weights.rename(weights.with_suffix(".bin"))
    result = peft("eval", folder)
    assert result.exit_code == 1
    assert "unsafe-weights" in result.output


def test_few_rows_evenly_drawn_each_answered_and_written_down(peft, trained, tmp_path):
    out = tmp_path / "answers.jsonl"
    run = trained("generation").path
    result = peft("eval", run, "--limit", "7", "--predictions", out)
    assert result.exit_code == 0, result.output
    assert "measured 7 of 16 rows, evenly drawn" in result.output
    assert '7 of 7 rows answered after the prompt "{text} Sentiment:" with no shots; greedy, up to 4' in result.output
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["row"] for answer in answers] == [0, 2, 4, 6, 9, 11, 13]
    assert list(answers[0]) == ["row", "input", "expected", "predicted", "correct", "score"]
    found = json.loads(peft("eval", run, "--limit", "7", "--json").stdout)
    assert found["difference"] == {}
    assert found["quality"]["rows_generated"] == found["quality"]["rows_measured"] == 7
    tuned = next(row for row in found["quality"]["rows"] if row["name"] == "tuned")
    # A mean over rows that are all alike has none: seven times nought would pretend to certainty.
    assert {"loss", "perplexity", "exact_match"} <= set(tuned["intervals"]) <= set(tuned["metrics"])
    for name, (low, high) in tuned["intervals"].items():
        assert low <= tuned["metrics"][name] <= high or name == "bleu"
    assert tuned["metrics"]["exact_match"] == sum(answer["correct"] for answer in answers) / 7
    assert json.loads(peft("eval", run, "--limit", "99", "--json").stdout)["quality"]["rows_measured"] == 16
    assert peft("eval", run, "--limit", "0").exit_code == 2
    assert "names no format" in peft("eval", run, "--predictions", "answers.txt").output


def test_other_decoding_is_another_protocol(peft, trained):
    found = json.loads(peft("eval", trained("generation").path, "task.beams=2", "--limit", "3", "--json").stdout)
    assert found["quality"]["protocol"]["decoding"] == "2 beams"
    result = peft("eval", trained("generation").path, "task.beams=2")
    assert "digit for digit" not in result.output
    assert "against the run's report" not in result.output


def test_a_classifier_has_few_rows_too(peft, trained):
    found = json.loads(peft("eval", trained("words").path, "--limit", "5", "--json").stdout)
    assert found["quality"]["rows_measured"] == 5
    low, high = found["quality"]["rows"][-1]["intervals"]["accuracy"]
    assert 0 <= low < high <= 1
