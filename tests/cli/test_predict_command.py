"""`peft predict`: answers are the evaluation's, the file's columns stay, what is wrong with a file has its place."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["words", "linear in bf16", "full", "prompt", "generation"])
def test_answers_are_those_of_the_report(peft, trained, rows, kind):
    result = peft("predict", trained(kind).path, "--input", rows["test"])
    assert result.exit_code == 0, result.output
    found = lines(result.stdout)
    asked = lines(Path(rows["test"]).read_text())
    assert [{key: row[key] for key in ("text", "label")} for row in found] == asked
    told = {example["row"]: example["tuned"] for example in trained(kind).read_report()["examples"]}
    assert {row: found[row]["predicted"] for row in told} == told
    if kind != "generation":
        for row in found:
            assert row["predicted"] == max(row["probabilities"], key=row["probabilities"].get)
            assert sum(row["probabilities"].values()) == pytest.approx(1)


def test_columns_of_the_input_are_kept_and_the_answer_column_is_not_needed(peft, trained, tmp_path):
    file = write(tmp_path / "in.jsonl", {"id": 7, "body": "good", "row": "x", "more": [1]}, {"body": "bad", "id": 8})
    result = peft("predict", trained("words").path, "data.columns.text=body", "--input", file)
    assert result.exit_code == 0, result.output
    first, second = lines(result.stdout)
    assert {key: first[key] for key in ("id", "body", "row", "more")} == {
        "id": 7, "body": "good", "row": "x", "more": [1]
    }  # fmt: skip
    assert set(second) == {"body", "id", "predicted", "score", "probabilities"}


def test_csv_in_and_out(peft, trained, tmp_path):
    file, out = tmp_path / "in.csv", tmp_path / "new" / "out.csv"
    file.write_text('id,text\n1,"good, and great"\n2,a bad plot\n')
    result = peft("predict", trained("words").path, "--input", file, "--output", out)
    assert result.exit_code == 0, result.output
    assert str(out) in result.output
    with out.open(newline="") as opened:
        found = list(csv.DictReader(opened))
    assert [row["text"] for row in found] == ["good, and great", "a bad plot"]
    assert list(found[0]) == ["id", "text", "predicted", "score", "probability of bad", "probability of good"]


def test_parquet_in_and_a_json_object_out(peft, trained, tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": ["good", "bad"], "predicted": ["x", "y"]}), tmp_path / "in.parquet")
    result = peft("predict", trained("words").path, "--input", tmp_path / "in.parquet", "--json")
    found = json.loads(result.stdout)
    assert [row["text"] for row in found["predictions"]] == ["good", "bad"]
    assert {row["predicted"] for row in found["predictions"]} <= {"good", "bad"}
    assert "the predictions take the place of: predicted" in result.stderr


def test_one_text(peft, trained):
    assert peft("predict", trained("words").path, "--text", "a good film").stdout.split()[0] in ("good", "bad")
    assert set(json.loads(peft("predict", trained("generation").path, "--text", "a film", "--json").stdout)) == {
        "predicted"
    }
    assert peft("predict", trained("words").path, "--text", " ").exit_code == 2


def test_more_rows_than_are_sorted_at_once_stay_in_order(peft, trained, rows, monkeypatch):
    from peftcli.artifacts import answers

    whole = lines(peft("predict", trained("words").path, "--input", rows["train"]).stdout)
    monkeypatch.setattr(answers, "CHUNK", 1)
    result = peft("predict", trained("words").path, "training.eval_batch_size=3", "--input", rows["train"])
    parts = lines(result.stdout)
    assert [row["text"] for row in parts] == [row["text"] for row in whole]
    assert [row["score"] for row in parts] == pytest.approx([row["score"] for row in whole], abs=1e-5)


@pytest.mark.parametrize(
    ("contents", "told"),
    [
        ([{"txt": "a"}], ["column 'text' not found, columns are: txt", "did you mean: txt"]),
        ([{"text": "a"}, {"text": " "}], ["in.jsonl:2: text is empty", "data.bad_rows=skip"]),
        ([], ["the file is empty"]),
    ],
)
def test_what_is_wrong_with_a_file_is_told(peft, trained, tmp_path, contents, told):
    result = peft("predict", trained("words").path, "--input", write(tmp_path / "in.jsonl", *contents))
    assert result.exit_code == 2
    assert all(part in result.output for part in told)
    assert result.stdout == ""


def test_bad_rows_are_left_out_and_counted_where_that_is_asked_for(peft, trained, tmp_path):
    file = write(tmp_path / "in.jsonl", {"text": "a"}, {"text": None}, {"text": "b"})
    result = peft("predict", trained("words").path, "data.bad_rows=skip", "--input", file)
    assert [row["text"] for row in lines(result.stdout)] == ["a", "b"]
    assert "left out 1 of 3 rows" in result.stderr


def test_what_cannot_be_asked_is_said_before_the_model_is_loaded(peft, tmp_path):
    assert "either a file or one text" in peft("predict", tmp_path).output
    result = peft("predict", tmp_path, "--input", "a.jsonl", "--output", "b.xlsx")
    assert result.exit_code == 2
    assert ".jsonl, .ndjson, .csv" in result.output
    result = peft("predict", tmp_path / "nothing", "--text", "a")
    assert "is not a run folder" in result.output
