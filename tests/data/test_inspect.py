"""Planted duplicates, leaks and contradictions are found and counted; lengths add up."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftcli.data import inspect
from peftcli.data.duplicates import near, normal
from peftcli.data.rows import Rows

WORDS = [f"w{i}" for i in range(3000)]


def text_of(rng: random.Random, words: int = 60) -> list[str]:
    return rng.choices(WORDS, k=words)


def rows(texts, labels=None):
    labels = labels or ["a", "b"] * len(texts)
    return Rows.from_list([{"text": t, "label": labels[i], "row": i} for i, t in enumerate(texts)])


def test_equal_and_near_rows_within_and_across_splits():
    rng = random.Random(0)
    base = [text_of(rng) for _ in range(40)]
    texts = [" ".join(words) for words in base]
    changed = " ".join([*base[3][:30], "another", *base[3][31:]])
    train = [*texts, texts[5].upper(), texts[5] + " \n"]
    test = [texts[7], changed, " ".join(text_of(rng)), texts[7]]
    report = inspect.describe({"train": rows(train), "test": rows(test)}, ["text"])
    tables = {(t["split"], t["against"]): (t["rows"], t["equal"], t["near"]) for t in report["duplicates"]}
    assert tables == {("train", "train"): (42, 2, 0), ("test", "train"): (4, 2, 1), ("test", "test"): (4, 1, 0)}
    (across,) = (t for t in report["duplicates"] if t["split"] != t["against"])
    assert [(e["row"], e["other"]) for e in across["examples"]] == [(0, 7), (3, 7), (1, 3)]
    assert 0.8 < across["examples"][2]["similarity"] < 1
    assert report["leakage"] == ["2 of 4 test rows read the same as a training row, 1 more nearly so"]


def test_equal_texts_with_different_labels():
    report = inspect.describe(
        {"train": rows(["one", "two", "One "], ["a", "b", "c"]), "test": rows(["two", "three"], ["b", "x"])},
        ["text"],
    )
    assert (report["conflicts"]["texts"], report["conflicts"]["rows"]) == (1, 2)
    assert report["conflicts"]["examples"][0]["rows"] == [
        {"split": "train", "row": 0, "label": "a"},
        {"split": "train", "row": 2, "label": "c"},
    ]
    assert report["splits"]["train"]["labels"] == {"a": 1, "b": 1, "c": 1}


def test_answers_do_not_make_a_question_another():
    made = [{"prompt": "how many", "completion": c, "row": i} for i, c in enumerate(["two", "three"])]
    report = inspect.describe({"train": Rows.from_list(made)}, ["prompt"])
    assert report["duplicates"][0]["equal"] == 1
    assert report["conflicts"]["texts"] == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=50))
def test_histogram_covers_every_length(lengths):
    found = inspect.histogram(lengths)
    assert sum(b["rows"] for b in found["bins"]) == len(lengths)
    assert (found["bins"][0]["from"], found["bins"][-1]["to"]) == (min(lengths), max(lengths))
    for b in found["bins"]:
        assert b["rows"] == sum(b["from"] <= n <= b["to"] for n in lengths)


def similarity(first: str, second: str) -> float:
    a, b = ({tuple(t.split()[i : i + 3]) for i in range(len(t.split()) - 2)} for t in (first, second))
    return len(a & b) / len(a | b)


def test_near_finds_all_pairs_above_the_threshold_and_no_other():
    rng = random.Random(1)
    texts = []
    for _ in range(60):
        words = text_of(rng, 40)
        texts.append(" ".join(words))
        for changes in (1, 2, 4):
            other = words.copy()
            for at in rng.sample(range(40), changes):
                other[at] = rng.choice(WORDS)
            texts.append(" ".join(other))
    found = {(p.first, p.second): p.similarity for p in near(texts, 0.8)}
    pairs = ((i, j) for i in range(len(texts)) for j in range(i + 1, min(i + 4, len(texts))))
    expected = {(i, j): similarity(texts[i], texts[j]) for i, j in pairs}
    expected = {pair: s for pair, s in expected.items() if s >= 0.8}
    assert len(expected) > 60
    assert found.keys() == expected.keys()
    assert all(abs(found[pair] - expected[pair]) < 1e-3 for pair in found)


def test_short_texts_and_scripts_without_spaces():
    assert near(["a", "b", "", "one two", "one three"]) == []
    (pair,) = near(
        [
            "今日はとても良い天気ですねそうですね散歩に行きましょう",
            "今日はとても良い天気ですねそうですね散歩に行きましょ",
        ]
    )
    assert pair.similarity > 0.9
    assert normal("  A\nb ") == "a b"


@pytest.mark.parametrize("same", [False, True])
def test_eight_thousand_documents_in_seconds(same):
    rng = random.Random(2)
    head = text_of(rng, 95) if same else []
    texts = [" ".join([*head, *text_of(rng, 100 - len(head))]) for _ in range(8000)]
    start = time.perf_counter()
    pairs = near(texts)
    assert time.perf_counter() - start < 10
    assert bool(pairs) == same
