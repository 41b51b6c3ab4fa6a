"""Padding on either side, labels that are not supervised, other numbers passed on."""

from __future__ import annotations

import pytest

from peftcli.data.collate import pad

ROWS = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "row": 3, "text": "a"},
    {"input_ids": [8], "labels": [8], "row": 9, "text": "b"},
]


def test_right():
    batch = pad(ROWS, pad_id=1)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 1, 1]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
        "row": [3, 9],
    }


def test_left():
    batch = pad(ROWS, pad_id=0, side="left")
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, -100, 8]]


def test_one_label_a_row():
    batch = pad([{"input_ids": [1, 2], "labels": 4}, {"input_ids": [1], "labels": 0}], pad_id=0)
    assert batch["labels"].tolist() == [4, 0]


def test_labels_of_another_length_are_refused():
    with pytest.raises(ValueError, match="row 1 has 2 tokens and 1 labels"):
        pad([ROWS[0], {"input_ids": [1, 2], "labels": [1]}], pad_id=0)
