"""Rows read as a list of dictionaries, and their fingerprint knows values alone."""

from __future__ import annotations

import pyarrow as pa
import pytest
from pyarrow import parquet

from peftcli.data.rows import Rows

LIST = [{"text": f"text {i} é", "label": "ab"[i % 2], "row": i, "ids": list(range(i))} for i in range(10)]


def test_reads_as_a_list():
    rows = Rows.from_list(LIST)
    assert len(rows) == 10
    assert list(rows) == LIST
    assert rows[3] == LIST[3]
    assert rows[-1] == LIST[-1]
    assert list(rows[2:4]) == LIST[2:4]
    assert rows["label"] == ["a", "b"] * 5
    assert rows.take([4, 0]) == [LIST[4], LIST[0]]
    assert list(rows.select([4, 0])) == [LIST[4], LIST[0]]
    assert rows.lengths("ids") == list(range(10))
    with pytest.raises(IndexError):
        rows[10]


def test_a_missing_key_is_none():
    assert Rows.from_list([{"a": 1}, {"b": "x"}])[1] == {"a": None, "b": "x"}


def test_fingerprint_knows_values_not_their_storage(tmp_path):
    rows = Rows.from_list(LIST)
    parquet.write_table(rows.table, tmp_path / "a.parquet", use_dictionary=True, row_group_size=3)
    halves = pa.concat_tables([rows.table.slice(0, 4), rows.table.slice(4)])
    coded = rows.table.set_column(1, "label", rows.table.column("label").dictionary_encode())
    same = [
        Rows(parquet.read_table(tmp_path / "a.parquet")),
        Rows(halves),
        Rows(coded),
        rows.select(range(10)),
        Rows.from_list([LIST[0], *LIST])[1:],
    ]
    assert {other.fingerprint() for other in same} == {rows.fingerprint()}


@pytest.mark.parametrize(
    "other",
    [
        LIST[1:],
        LIST[::-1],
        [{**LIST[0], "text": "text 0 e"}, *LIST[1:]],
        [{**row, "label": {"a": "b", "b": "a"}[row["label"]]} for row in LIST],
        [{"words": row["text"], **{k: row[k] for k in ("label", "row", "ids")}} for row in LIST],
    ],
)
def test_fingerprint_changes_with_any_value(other):
    assert Rows.from_list(other).fingerprint() != Rows.from_list(LIST).fingerprint()
