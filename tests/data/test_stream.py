"""Streamed training rows: every row once a pass, the same from any step on, the same checks as in memory."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest

from peftcli.config.errors import UserError
from peftcli.config.schema import DataConfig
from peftcli.data import sources


def stream(lines, bad_rows="error", **settings):
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    config = DataConfig(source="files", files={"train": "train.jsonl"}, streaming=True, bad_rows=bad_rows, **settings)
    return sources.load(config, ["text"])


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


ROWS = [{"text": f"t{i}"} for i in range(2345)]


def test_each_pass_has_every_row_once_and_passes_differ():
    batches = stream(ROWS).train.batches(7, seed=3)
    rows = [row["row"] for batch in islice(batches, 670) for row in batch]
    first, second = rows[:2345], rows[2345:4690]
    assert sorted(first) == sorted(second) == list(range(2345))
    assert first != second
    assert first[:1000] != sorted(first[:1000])


@pytest.mark.parametrize("start", [0, 1, 99, 142, 143, 335, 400])
def test_any_step_gives_what_it_gives_without_a_break(start):
    whole = list(islice(stream(ROWS).train.batches(7, seed=3), start + 3))
    assert list(islice(stream(ROWS).train.batches(7, seed=3, start=start), 3)) == whole[start:]


def test_limit_head_and_notes():
    splits = stream(ROWS, rows={"train": 10})
    assert [row["row"] for row in splits.train] == list(range(10))
    assert splits.train.head(2) == [{"text": "t0", "row": 0}, {"text": "t1", "row": 1}]
    assert "train is streamed" in splits.notes[0]
    assert "none are set aside from a stream" in splits.notes[1]
    assert splits.fingerprint != stream(ROWS, rows={"train": 11}).fingerprint
    assert splits.fingerprint == stream(ROWS, rows={"train": 10}).fingerprint


def test_bad_rows_stop_it_or_are_counted():
    rows = [*ROWS[:5], {"text": " "}, *ROWS[6:10]]
    with pytest.raises(UserError, match="jsonl:6: text is empty"):
        list(stream(rows).train)
    skipping = stream(rows, "skip").train
    assert [row["row"] for row in skipping] == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert skipping.skipped == 1
    with pytest.raises(UserError, match="no usable row"):
        next(stream([{"text": ""}], "skip").train.batches(2, seed=0))
