"""Tokenised once: a second run reads, other rows or settings compute, damage is mended, writers do not meet."""

from __future__ import annotations

import threading

import pytest

from peftcli.config import paths
from peftcli.data import encoded
from peftcli.data.rows import Rows


class Counting:
    """An encoding that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, row):
        self.calls += 1
        ids = [ord(c) for c in row["text"]]
        return {"input_ids": ids, "labels": [-100] * len(ids), "row": row["row"]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def rows():
    return Rows.from_list([{"text": f"row {i}", "row": i} for i in range(50)])


def files():
    return list((paths.cache() / "encoded").iterdir())


def test_second_run_does_not_tokenise_again(rows):
    first, second = Counting(), Counting()
    made = encoded.encode(rows, first, "key")
    kept = encoded.encode(Rows.from_list(list(rows)), second, "key")
    assert (first.calls, second.calls) == (50, 0)
    assert list(kept) == list(made)
    assert kept[7] == {"input_ids": [114, 111, 119, 32, 55], "labels": [-100] * 5, "row": 7}


def test_other_rows_or_another_key_are_computed(rows):
    fn = Counting()
    encoded.encode(rows, fn, "key")
    encoded.encode(rows, fn, "other key")
    encoded.encode(rows.select(range(49, -1, -1)), fn, "key")
    assert fn.calls == 150
    assert len(files()) == 3


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied"])
def test_a_damaged_file_is_made_anew(rows, damage, caplog):
    made = list(encoded.encode(rows, Counting(), "key"))
    (path,) = files()
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[40] ^= 0xFF
    path.write_bytes({"truncated": content[:-30], "flipped": content, "emptied": b""}[damage])
    again, third = Counting(), Counting()
    assert list(encoded.encode(rows, again, "key")) == made
    assert again.calls == 50
    assert "damaged" in caplog.text
    encoded.encode(rows, third, "key")
    assert third.calls == 0


def test_writers_at_once_leave_one_whole_file(rows):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(list(encoded.encode(rows, Counting(), "key")))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result == results[0] for result in results)
    assert [path.suffix for path in files()] == [".parquet"]


def test_a_failing_write_leaves_no_rest_and_loses_nothing(rows, monkeypatch, caplog):
    def full(table, path, **_):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encoded.parquet, "write_table", full)
    assert len(encoded.encode(rows, Counting(), "key")) == 50
    assert files() == []
    assert "No space left" in caplog.text
