"""Rows from files, samples and the hub: what is accepted, what is refused and how the refusal reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from peftcli.config.errors import UserError
from peftcli.config.schema import DataConfig
from peftcli.data import hub, sources

NEEDED = ["text", "label"]
GOOD = [{"text": f"text {i}", "label": "ab"[i % 2], "id": i} for i in range(20)]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))


def jsonl(rows, name="train.jsonl"):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def load(needed=NEEDED, **settings):
    settings.setdefault("validation_share", 0.0)
    return sources.load(DataConfig(**({"source": "files"} | settings)), needed)


def mistake(needed=NEEDED, **settings) -> str:
    with pytest.raises(UserError) as error:
        load(needed, **settings)
    return str(error.value)


def test_three_formats_give_the_same_rows_and_fingerprint():
    jsonl(GOOD, "a.jsonl")
    Path("b.json").write_text(json.dumps(GOOD, indent=1))
    Path("c.csv").write_text("text,label,id\n" + "".join(f"{r['text']},{r['label']},{r['id']}\n" for r in GOOD))
    Path("d.tsv").write_text("text\tlabel\n" + "".join(f"{r['text']}\t{r['label']}\n" for r in GOOD))
    parquet.write_table(pa.Table.from_pylist(GOOD), "e.parquet")
    found = [load(files={"train": name}) for name in ("a.jsonl", "b.json", "c.csv", "d.tsv", "e.parquet")]
    assert len({splits.fingerprint for splits in found}) == 1
    assert list(found[0].train)[3] == {"text": "text 3", "label": "b", "row": 3}
    assert found[0].counts == {"train": 20, "skipped": {}}


def test_csv_with_quotes_line_breaks_semicolons_and_a_byte_order_mark():
    Path("a.csv").write_bytes('\ufefftext;label\r\n"a; ""b""\nc";1\r\n d ;02\r\n'.encode())
    assert list(load(files={"train": "a.csv"}).train) == [
        {"text": 'a; "b"\nc', "label": "1", "row": 0},
        {"text": " d ", "label": "02", "row": 1},
    ]


def test_several_files_and_globs_are_one_split():
    jsonl(GOOD[:5], "part-1.jsonl")
    jsonl(GOOD[5:9], "part-2.jsonl")
    jsonl(GOOD[9:], "rest.jsonl")
    rows = load(files={"train": ["part-*.jsonl", "rest.jsonl"]}).train
    assert rows["text"] == [row["text"] for row in GOOD]
    assert rows["row"] == list(range(20))


def test_missing_files_are_named_together_with_the_nearest():
    jsonl(GOOD)
    text = mistake(files={"train": "trian.jsonl", "test": "nowhere/test.csv", "validation": "*.parquet"})
    assert "no file trian.jsonl" in text
    assert "did you mean: train.jsonl" in text
    assert "the folder nowhere does not exist" in text
    assert "no file matches *.parquet" in text


def test_an_empty_file_a_folder_an_unknown_ending_and_an_unknown_split():
    Path("empty.jsonl").touch()
    Path("blank.jsonl").write_text("\n\n")
    Path("header.csv").write_text("text,label\n")
    Path("a.txt").write_text("x")
    assert "empty.jsonl: the file is empty" in mistake(files={"train": "empty.jsonl"})
    assert "blank.jsonl: the file has no rows" in mistake(files={"train": "blank.jsonl"})
    assert "header.csv: the file has no rows" in mistake(files={"train": "header.csv"})
    assert "is a folder" in mistake(files={"train": "."})
    assert "data.format=jsonl" in mistake(files={"train": "a.txt"})
    assert "did you mean: train" in mistake(files={"trian": "a.txt"})


def test_an_unreadable_file(tmp_path, monkeypatch):
    name = jsonl(GOOD)

    def refused(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    assert "cannot read the file: Permission denied" in mistake(files={"train": name})


def test_the_same_file_in_two_splits():
    jsonl(GOOD)
    assert "train.jsonl is in both train and test" in mistake(files={"train": "train.jsonl", "test": "./train.jsonl"})


def test_malformed_lines_are_named_by_file_and_line():
    Path("a.jsonl").write_text('{"text":"a","label":"b"}\n\n{"text": \n[1]\n{"text":"c","label":"d"}\n')
    text = mistake(files={"train": "a.jsonl"})
    assert "2 of 4 rows: a.jsonl:3: not valid JSON" in text
    assert "a.jsonl:4: not a JSON object: [1]" in text
    splits = load(files={"train": "a.jsonl"}, bad_rows="skip")
    assert splits.train["row"] == [0, 3]
    assert splits.counts["skipped"] == {"train": {"not valid JSON": 1, "not a JSON object": 1}}
    assert any("left out 2 of 4 rows: a.jsonl:3" in note for note in splits.notes)


def test_broken_json_is_said_to_be_at_one_place():
    Path("a.jsonl").write_text('{"text": "a", "label": "b\n{"text": "a", "label": "b"}\n')
    text = mistake(files={"train": "a.jsonl"})
    assert ": Invalid control character at column 26" in text


def test_ragged_csv_rows_are_named_by_line_also_after_a_line_break_in_quotes():
    Path("a.csv").write_text('text,label\n"a\nb",x\nc,d,e\nf\ng,h\n')
    text = mistake(files={"train": "a.csv"})
    assert "a.csv:4: 3 values where the header has 2 columns" in text
    assert "a.csv:5: 1 values" in text
    assert load(files={"train": "a.csv"}, bad_rows="skip").train["text"] == ["a\nb", "g"]


def test_a_csv_header_that_repeats_a_name():
    Path("a.csv").write_text("text,label,text\na,b,c\n")
    assert "a.csv:1: the header names text twice" in mistake(files={"train": "a.csv"})


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_text_that_is_not_utf8(name):
    lines = {"a.jsonl": ['{"text":"a","label":"b"}', '{"text":"é","label":"b"}'], "a.csv": ["text,label", "a,b", "é,b"]}
    Path(name).write_bytes("\n".join(lines[name]).encode("latin1"))
    text = mistake(files={"train": name})
    assert f"{name}:{len(lines[name])}: not UTF-8: byte 0xe9" in text
    assert "iconv -f latin1" in text
    assert text.count("leave such rows out") == text.count("data.bad_rows=skip") == 1
    assert len(load(files={"train": name}, bad_rows="skip").train) == 1


def test_a_damaged_parquet_file():
    parquet.write_table(pa.Table.from_pylist(GOOD), "a.parquet")
    content = Path("a.parquet").read_bytes()
    Path("a.parquet").write_bytes(content[: len(content) // 2])
    assert "a.parquet: not a readable parquet file" in mistake(files={"train": "a.parquet"})


@pytest.mark.parametrize("value", [None, "", " \n", float("nan")])
def test_empty_and_unlabelled_rows(value):
    jsonl([*GOOD, {"text": "t", "label": value}, {"text": " ", "label": "a"}, {"label": "a"}])
    text = mistake(files={"train": "train.jsonl"})
    assert "3 of 23 rows: train.jsonl:21: label is empty; train.jsonl:22: text is empty" in text
    assert "data.bad_rows=skip" in text
    splits = load(files={"train": "train.jsonl"}, bad_rows="skip")
    assert splits.counts == {"train": 20, "skipped": {"train": {"label is empty": 1, "text is empty": 2}}}


def test_many_bad_rows_are_counted_and_only_some_named():
    jsonl([*GOOD, *[{"text": "", "label": "a"}] * 30])
    text = mistake(files={"train": "train.jsonl"})
    assert "30 of 50 rows" in text
    assert "and 27 more" in text
    assert len(text) < 600


def test_a_split_without_any_label():
    jsonl(GOOD)
    jsonl([{"text": "a", "label": None}] * 3, "test.jsonl")
    for bad_rows in ("error", "skip"):
        text = mistake(files={"train": "train.jsonl", "test": "test.jsonl"}, bad_rows=bad_rows)
        assert "no row of test can be used" in text


def test_missing_columns_of_all_splits_with_the_nearest_and_the_likely():
    jsonl([{"texts": "a", "topic": "b"}])
    jsonl([{"text": "a", "topic": "b"}], "test.jsonl")
    text = mistake(files={"train": "train.jsonl", "test": "test.jsonl"})
    assert "train, train.jsonl: column 'text' not found, columns are: texts, topic\n  did you mean: texts" in text
    assert text.count("data.columns.label=topic") == 2


def test_a_partial_mapping_leaves_the_other_columns_as_they_are():
    jsonl([{"text": "a", "topic": "b", "extra": 1}])
    splits = load(files={"train": "train.jsonl"}, columns={"label": "topic"})
    assert splits.train[0] == {"text": "a", "label": "b", "row": 0}
    splits = load(["text"], files={"train": "train.jsonl"}, columns={"number": "extra"})
    assert splits.train[0] == {"text": "a", "number": 1, "row": 0}
    assert splits.notes == ["data.columns.number: the task does not use 'number'"]


def test_one_column_may_serve_twice():
    jsonl([{"text": "a", "label": "b"}])
    assert load(["text", "prompt"], files={"train": "train.jsonl"}, columns={"prompt": "text"}).train[0] == {
        "text": "a",
        "prompt": "a",
        "row": 0,
    }


def test_values_of_two_kinds_in_a_column():
    jsonl([*GOOD, {"text": "a", "label": 3}])
    text = mistake(files={"train": "train.jsonl"})
    assert "train.jsonl:21: label holds str in the rows before and int here" in text


def test_messages_keep_their_shape():
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    jsonl([{"messages": talk}] * 3)
    assert load(["messages"], files={"train": "train.jsonl"}).train[1]["messages"] == talk


def test_shares_are_set_aside_by_class_and_by_the_seed():
    jsonl([{"text": f"t{i}", "label": "rare" if i in (7, 400) else "ab"[i % 4 == 0]} for i in range(1000)])
    settings = {"files": {"train": "train.jsonl"}, "validation_share": 0.1, "test_share": 0.2}
    splits = load(**settings)
    assert splits.counts == {"train": 700, "validation": 100, "test": 200, "skipped": {}}
    rows = [row for split in (splits.train, splits.validation, splits.test) for row in split["row"]]
    assert sorted(rows) == list(range(1000))
    assert abs(splits.test["label"].count("b") - 50) <= 1
    assert "rare" in splits.train["label"]
    assert load(**settings).fingerprint == splits.fingerprint
    assert load(**settings, seed=1).fingerprint != splits.fingerprint


def test_shares_are_left_alone_where_the_source_has_the_split():
    jsonl(GOOD)
    jsonl(GOOD[:3], "dev.jsonl")
    splits = load(files={"train": "train.jsonl", "validation": "dev.jsonl"}, validation_share=0.5)
    assert splits.counts == {"train": 20, "validation": 3, "skipped": {}}


def test_too_few_rows_to_split_and_shares_that_are_none():
    jsonl(GOOD[:1])
    assert "cannot be split" in mistake(files={"train": "train.jsonl"}, validation_share=0.1)
    assert "is not a share" in mistake(files={"train": "train.jsonl"}, validation_share=1.5)
    assert "leave no training rows" in mistake(files={"train": "train.jsonl"}, validation_share=0.5, test_share=0.5)
    assert "no number of rows" in mistake(files={"train": "train.jsonl"}, rows={"train": 0})


def test_fewer_rows_are_part_of_more_rows():
    jsonl(GOOD)
    few, more = (set(load(files={"train": "train.jsonl"}, rows={"train": n}).train["row"]) for n in (5, 10))
    assert len(few) == 5
    assert few < more
    splits = load(files={"train": "train.jsonl"}, rows={"train": 100})
    assert len(splits.train) == 20
    assert "all 20 rows are used" in splits.notes[0]


def sample(name="words", splits=("train", "dev")):
    folder = Path("cache/samples") / name
    folder.mkdir(parents=True)
    for split in splits:
        parquet.write_table(pa.Table.from_pylist(GOOD), folder / f"{split}.parquet")
    (folder / "complete").touch()


def test_a_sample_its_splits_and_what_is_not_used():
    sample()
    splits = load(source="sample", name="words")
    assert splits.counts == {"train": 20, "skipped": {}}
    assert "not used: dev" in splits.notes[0]
    assert load(source="sample", name="words", splits={"validation": "dev"}).counts["validation"] == 20
    assert "did you mean: dev" in mistake(source="sample", name="words", splits={"validation": "deev"})


def test_a_sample_that_is_not_there():
    assert "peft samples fetch words" in mistake(source="sample", name="words")


def test_a_source_without_its_name():
    assert "data.name is missing" in mistake(source="sample")
    assert "data.files is missing" in mistake()
    jsonl(GOOD)
    assert "no train split; there is test" in mistake(files={"test": "train.jsonl"})


def test_files_and_samples_do_not_import_datasets():
    code = (
        "import sys; from peftcli.config.schema import DataConfig; from peftcli.data import sources;"
        "import peftcli.data.sampler, peftcli.data.collate, peftcli.data.encoded;"
        "sources.load(DataConfig(source='files', files={'train': 'train.jsonl'}), ['text']);"
        "print(sorted({'torch', 'datasets', 'sklearn'} & set(sys.modules)))"
    )
    jsonl(GOOD)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.fixture
def hub_copy(tmp_path):
    """A data set as the hub serves it, with class numbers and an unlabelled test split."""
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    folder = tmp_path / "user" / "set"
    folder.mkdir(parents=True)
    for split, labels in {"train": [0, 1, 1], "validation": [0, 1], "test": [-1, -1]}.items():
        rows = {"text": [f"{split} {i}" for i in range(len(labels))], "label": labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_data_set_gives_class_names(hub_copy, streaming):
    both = {"validation": "validation", "test": "validation"}
    splits = load(source="hub", name=hub_copy, splits=both, streaming=streaming)
    assert list(splits.train) == [
        {"text": "train 0", "label": "no", "row": 0},
        {"text": "train 1", "label": "yes", "row": 1},
        {"text": "train 2", "label": "yes", "row": 2},
    ]
    assert splits.counts["validation"] == 2
    assert "no row of test can be used" in mistake(source="hub", name=hub_copy)


def test_a_validation_split_that_is_the_test_split_is_not_also_what_is_chosen_by(hub_copy):
    splits = load(source="hub", name=hub_copy, splits={"test": "validation"}, validation_share=0.34)
    assert (splits.counts["train"], splits.counts["validation"], splits.counts["test"]) == (2, 1, 2)
    assert any("set aside from train" in note for note in splits.notes)


def test_a_hub_data_set_without_network_says_at_once_what_else_there_is(monkeypatch):
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    text = mistake(source="hub", name="someone/something")
    assert "'someone/something' is not in its cache" in text
    assert "data.source=files" in text
    assert "peft samples list" in text


def test_a_stream_from_the_hub_is_pinned_to_the_commit_it_has_now(hub_copy, monkeypatch):
    import datasets
    import huggingface_hub

    real, asked = datasets.load_dataset, []

    def from_the_copy(name, subset, revision, streaming):
        asked.append(revision)
        return real(hub_copy, streaming=streaming)

    def prints(sha, **settings):
        info = huggingface_hub.hf_api.DatasetInfo(id="someone/set", sha=sha)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: info)
        return load(source="hub", name="someone/set", splits={"test": "validation"}, streaming=True, **settings)

    monkeypatch.setattr(datasets, "load_dataset", from_the_copy)
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    first, moved = prints("a" * 40), prints("b" * 40, revision="main")
    assert asked == ["a" * 40, "b" * 40]
    assert first.fingerprint == prints("a" * 40).fingerprint != moved.fingerprint
    assert any(f"data.revision={'a' * 40} repeats it" in note for note in first.notes)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: (_ for _ in ()).throw(OSError("busy")))
    unknown = load(source="hub", name="someone/set", splits={"test": "validation"}, streaming=True)
    assert asked[-1] is None
    assert any("not pinned" in note for note in unknown.notes)


@pytest.mark.parametrize("value", [[], 3, None, {"a": "b"}, [1]])
def test_files_that_are_no_paths(value):
    assert "names no file" in mistake(files={"train": value})


def test_values_that_no_column_can_hold_and_nesting_without_end():
    Path("a.jsonl").write_text('{"text":"a","label":"b"}\n{"text":"\\ud800","label":"b"}\n')
    assert "a.jsonl:2: text cannot be kept" in mistake(files={"train": "a.jsonl"})
    Path("b.jsonl").write_text('{"text":"a","label":123456789012345678901234567890}\n')
    assert "b.jsonl:1: label cannot be kept" in mistake(files={"train": "b.jsonl"})
    Path("c.jsonl").write_text('{"text":"a","label":"b"}\n' + "[" * 100_000 + "\n")
    assert "c.jsonl:2: JSON nested too deeply" in mistake(files={"train": "c.jsonl"})


def test_a_file_in_utf_16_is_said_to_be_none_of_ours():
    Path("a.csv").write_bytes("text,label\na,b\n".encode("utf-16"))
    for name, codec in {"a.csv": "utf-16", "b.csv": "utf-16-be", "a.jsonl": "utf-16"}.items():
        mark = "\ufeff" if codec == "utf-16-be" else ""
        Path(name).write_bytes((mark + "text,label\na,b\n").encode(codec))
        text = mistake(files={"train": name})
        assert "the file is UTF-16, not UTF-8" in text
        assert "iconv -f utf-16 -t utf-8" in text
        assert "latin1" not in text


def test_a_file_is_suggested_only_where_it_is_close_and_free():
    jsonl(GOOD, "test.jsonl")
    jsonl(GOOD, "train.csv")
    Path("notes.txt").touch()
    text = mistake(files={"train": "nope.jsonl", "test": "test.jsonl"})
    assert "did you mean" not in text
    assert "data files in .: test.jsonl, train.csv" in text
    assert "notes" not in text
    assert "did you mean" not in mistake(files={"train": "tests.jsonl", "test": "test.jsonl"})
    assert "did you mean: train.csv" in mistake(files={"train": "train.jsonl", "test": "test.jsonl"})


def test_row_is_a_reserved_name_that_can_be_mapped_away():
    jsonl([{"text": "a", "row": "x"}])
    assert "data.columns.NAME=row" in mistake(["text", "row"], files={"train": "train.jsonl"})
    rows = load(["text", "name"], files={"train": "train.jsonl"}, columns={"name": "row"}).train
    assert rows[0] == {"text": "a", "name": "x", "row": 0}
    parquet.write_table(rows.table.rename_columns(["text", "row", "x"]), "a.parquet")
    rows = load(["text", "name"], files={"train": "a.parquet"}, columns={"name": "row"}).train
    assert rows[0] == {"text": "a", "name": "x", "row": 0}


KINDS = [{**row, "kind": "cd"[i % 4 > 2], "n": i % 3} for i, row in enumerate(GOOD)]


def test_rows_of_certain_values_keep_their_numbers():
    files = {"train": jsonl(KINDS, "a.jsonl"), "test": "b.parquet"}
    parquet.write_table(pa.Table.from_pylist(KINDS), "b.parquet")
    where = {"train": {"kind": "d"}, "test": {"kind": ["c", "d"], "n": 1}}
    found = load(files=files, where=where)
    assert found.train["row"] == [3, 7, 11, 15, 19]
    assert found.train.column_names == ["text", "label", "row"]
    assert found.test["row"] == list(range(1, 20, 3))
    assert found.fingerprint != load(files=files).fingerprint


def test_values_columns_and_splits_of_where_that_are_not_there():
    files = {"train": jsonl(KINDS)}
    told = mistake(files=files, where={"train": {"kind": "e"}})
    assert "data.where.train.kind" in told
    assert "unknown value 'e'" in told
    assert "c, d" in told
    assert "unknown column 'kinds'" in mistake(files=files, where={"train": {"kinds": "c"}})
    assert "no validation split of its own" in mistake(files=files, where={"validation": {"kind": "c"}})
    assert "unknown value '1'" in mistake(files=files, where={"train": {"text": "text 3", "n": 1}})
