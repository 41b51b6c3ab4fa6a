"""Rows that cannot be read, lack something or are too long: a plain message or a count, and a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftcli.training import closing
from tests.commands import assert_said

GENERATION = ["task={type: generation, prompt: '{text} Sentiment:', completion: '{label}', generated_rows: 0}"]


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(text: str, label: str) -> dict[str, str]:
    return {"text": text, "label": label}


def parquet_cut_short(path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": ["a"] * 99, "label": ["b"] * 99}), path)
    path.write_bytes(path.read_bytes()[:-20])


UNREADABLE = {
    "empty.jsonl": (lambda path: path.touch(), "the file is empty"),
    "blank.jsonl": (lambda path: path.write_text("\n\n"), "the file has no rows"),
    "header.csv": (lambda path: path.write_text("text,label\n"), "the file has no rows"),
    "noise.jsonl": (lambda path: path.write_bytes(bytes(range(128, 256))), "not UTF-8"),
    "half.jsonl": (lambda path: path.write_text('{"text": "a", "label": "b"}\n{"text": "a'), "not valid JSON"),
    "latin.csv": (lambda path: path.write_bytes(b"text,label\ncaf\xe9,good\n"), "not UTF-8: byte 0xe9"),
    "uneven.csv": (lambda path: path.write_text("text,label\na,b,c\n"), "3 values where the header has 2"),
    "short.parquet": (parquet_cut_short, "not a readable parquet file"),
    "folder.jsonl": (Path.mkdir, "is a folder"),
    "gone.jsonl": (lambda path: None, "no file"),
    "unlabelled.jsonl": (lambda path: write(path, row("a", "")), "label is empty"),
    "other.jsonl": (lambda path: write(path, {"body": "a", "label": "b"}), "column 'text' not found"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_data_file_that_cannot_be_used(peft, recipe, tmp_path, name):
    make, told = UNREADABLE[name]
    make(tmp_path / name)
    result = peft("train", recipe, f"data.files.train={tmp_path / name}")
    assert_said(result, 2, "mistake: ", str(tmp_path / name), told)


def test_a_mistake_in_the_data_leaves_no_run_and_latest_where_it_was(peft, recipe, rows, tmp_path, made):
    assert_said(peft("train", recipe), 0)
    broken = tmp_path / "train.jsonl"
    broken.write_text(Path(rows["train"]).read_text() + '{"text": "torn')
    result = peft("train", recipe, f"data.files.train={broken}")
    assert_said(result, 2, f"{broken}:41: not valid JSON")
    assert (tmp_path / "runs" / "latest").resolve() == made().path.resolve()


def test_a_data_file_broken_between_two_parts_of_a_run_can_be_mended(peft, recipe, rows, tmp_path, made, monkeypatch):
    train = tmp_path / "train.jsonl"
    train.write_text(Path(rows["train"]).read_text())
    with monkeypatch.context() as patch:
        patch.setattr(closing, "evaluate", interrupt)
        assert peft("train", recipe, f"data.files.train={train}").exit_code == 130
    train.write_text(Path(rows["train"]).read_text() + '{"text": "torn')
    result = peft("train", "--resume", made().path)
    assert_said(result, 2, f"{train}:41: not valid JSON", f"peft train --resume {made().path}")
    train.write_text(Path(rows["train"]).read_text())
    assert_said(peft("train", "--resume", made().path), 0)
    assert made().status == "done"


def interrupt(*_) -> None:
    raise KeyboardInterrupt


def test_an_empty_file_among_good_ones_is_named(peft, recipe, tmp_path, rows):
    (tmp_path / "empty.jsonl").touch()
    both = f"data.files.train=[{rows['train']},{tmp_path / 'empty.jsonl'}]"
    assert_said(peft("train", recipe, both), 2, f"{tmp_path / 'empty.jsonl'}: the file is empty")


def test_a_class_without_training_rows(peft, recipe, tmp_path, made):
    test = write(tmp_path / "test.jsonl", row("the film was", "good"), row("the plot was", "splendid"))
    result = peft("train", recipe, f"data.files.test={test}")
    assert_said(result, 1, "failed: label-mismatch", "test", "'splendid' (1 rows)", "labels in training: bad, good")
    assert made().status == "failed"
    assert made().read_report()["checks"][-1]["name"] == "label-mismatch"


def test_one_class_alone(peft, recipe, tmp_path):
    train = write(tmp_path / "train.jsonl", *[row(f"film {i}", "good") for i in range(9)])
    assert_said(peft("train", recipe, f"data.files.train={train}"), 1, "label-mismatch: all training rows have one")


def test_labels_that_are_all_masked(peft, recipe, tmp_path, made):
    long = [row("the film", "good " * 40) for _ in range(6)]
    files = {split: write(tmp_path / f"{split}.jsonl", *long) for split in ("train", "validation", "test")}
    given = [f"data.files.{split}={path}" for split, path in files.items()]
    result = peft("train", recipe, *GENERATION, "task.max_length=16", *given)
    assert_said(result, 1, "failed: no-trainable-tokens: none of 6 rows", "6 were left out", "task.max_length")
    assert made().status == "failed"


def test_rows_longer_than_the_maximum_are_cut_and_counted(peft, recipe, made, rows):
    result = peft("train", recipe, "task.max_length=24")
    data = made().read_report()["data"]
    assert 0 < data["train"]["truncated"] < data["train"]["rows"] == 40
    assert data["train"]["dropped"] == 0
    assert_said(result, 0, f"train: 40 rows, {data['train']['tokens']:,} tokens")
    for split in ("train", "validation", "test"):
        assert f"{data[split]['truncated']} cut to the longest length" in result.output
    assert "cut to the longest length" in made().log_file.read_text()


def test_completions_longer_than_the_maximum_are_left_out_and_counted(peft, recipe, tmp_path, made):
    train = write(tmp_path / "train.jsonl", *[row("the film", "good " * (60 if i < 2 else 1)) for i in range(12)])
    result = peft("train", recipe, *GENERATION, "task.max_length=32", f"data.files.train={train}")
    assert_said(result, 0, "2 left out as too long or empty")
    assert made().read_report()["data"]["train"] | {"tokens": 0, "trained_tokens": 0} == {
        "rows": 10, "tokens": 0, "trained_tokens": 0, "truncated": 0, "dropped": 2,
    }  # fmt: skip


def test_bad_rows_that_are_skipped_are_counted(peft, recipe, tmp_path, rows, made):
    train = tmp_path / "train.jsonl"
    train.write_text(Path(rows["train"]).read_text() + '{"text": "torn\n' + json.dumps(row("", "good")) + "\n")
    result = peft("train", recipe, f"data.files.train={train}", "data.bad_rows=skip")
    assert_said(result, 0, "note: train: left out 2 of 42 rows", f"{train}:41", f"{train}:42")
    assert any("left out 2 of 42" in note for note in made().read_report()["data"]["notes"])


def test_a_label_word_that_is_no_single_choice(peft, recipe, tmp_path):
    train = write(tmp_path / "train.jsonl", *[row(f"film {i}", ("goodly", "goods")[i % 2]) for i in range(20)])
    given = [f"data.files.train={train}", "~data.files.validation", "~data.files.test"]
    assert_said(peft("train", recipe, *given, "+task.labels={goodly: good, goods: good}"), 2, "goodly", "goods")
