"""What is in the splits: sizes, classes, lengths, texts that come twice, labels that contradict each other."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

from peftcli.data import duplicates
from peftcli.data.rows import Rows

EXAMPLES = 3
BINS = 8
MOST_TEXTS = 50_000
"""Different texts among which near duplicates are looked for."""


def describe(splits: dict[str, Rows], asked: list[str]) -> dict[str, Any]:
    """Everything that can be said of the rows without a model.

    Args:
        splits: Rows by train, validation and test, those there are.
        asked: Columns the model reads, without those it learns: rows that agree in them are the same question. A
            column `label` beside them makes class counts and contradictions.

    Returns:
        `splits`: rows, labels and words (a `histogram`) by split. `duplicates`: for each split against itself and
        those before it, how many rows are `equal` to one there, how many more are `near`, and examples; a row is
        counted against an earlier one, so each repeated text counts once less than it occurs. `conflicts`: equal
        texts with different labels. `leakage`: a sentence for each split that training rows leaked into. `notes`.
    """
    texts = {split: [question(row, asked) for row in rows] for split, rows in splits.items()}
    first, notes = _near(texts)
    return {
        "splits": {
            split: {
                "rows": len(rows),
                "labels": dict(Counter(map(str, rows["label"])).most_common()) if "label" in rows.column_names else {},
                "words": histogram(len(duplicates.WORD.findall(text)) for text in texts[split]),
            }
            for split, rows in splits.items()
        },
        "duplicates": (found := _tables(splits, texts, first)),
        "conflicts": _conflicts(splits, texts),
        "leakage": [
            f"{table['equal']} of {table['rows']} {table['split']} rows read the same as a training row, "
            f"{table['near']} more nearly so"
            for table in found
            if table["against"] == "train" != table["split"] and table["equal"] + table["near"]
        ],
        "notes": notes,
    }


def question(row: dict[str, Any], asked: list[str]) -> str:
    """What the model reads of a row, as one text."""
    return "\n".join(_text(row[name]) for name in asked)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(_text(item) for item in value)
    return "\n".join(_text(item) for item in value.values()) if isinstance(value, dict) else str(value)


def histogram(lengths: Iterable[int]) -> dict[str, Any]:
    """Distribution of lengths: `total`, `min`, `median`, `mean`, `p95`, `max`, and `bins` with `from`, `to`, `rows`.

    `to` belongs to its bin; the bins have whole, about equal widths.
    """
    values = np.fromiter(lengths, np.int64)
    if not len(values):
        return {"total": 0, "min": 0, "median": 0, "mean": 0.0, "p95": 0, "max": 0, "bins": []}
    low, high = int(values.min()), int(values.max())
    edges = np.unique(np.linspace(low, high + 1, min(BINS, high - low + 1) + 1).round().astype(int))
    rows, _ = np.histogram(values, bins=edges)
    bins = zip(edges[:-1], edges[1:] - 1, rows, strict=True)
    return {
        "total": int(values.sum()),
        "min": low,
        "median": int(np.median(values)),
        "mean": round(float(values.mean()), 1),
        "p95": int(np.percentile(values, 95)),
        "max": high,
        "bins": [{"from": int(a), "to": int(b), "rows": int(n)} for a, b, n in bins],
    }


Neighbours = dict[str, list[tuple[str, float]]]
"""For a normalised text, the others it is nearly equal to, with their similarity."""


def _near(texts: dict[str, list[str]]) -> tuple[Neighbours, list[str]]:
    unique = list(dict.fromkeys(duplicates.normal(text) for split in texts.values() for text in split))
    notes = []
    if len(unique) > MOST_TEXTS:
        notes.append(f"near duplicates: looked for among the first {MOST_TEXTS} of {len(unique)} different texts")
    unique = unique[:MOST_TEXTS]
    neighbours: Neighbours = defaultdict(list)
    for pair in duplicates.near(unique):
        neighbours[unique[pair.first]].append((unique[pair.second], pair.similarity))
        neighbours[unique[pair.second]].append((unique[pair.first], pair.similarity))
    return neighbours, notes


def _tables(splits: dict[str, Rows], texts: dict[str, list[str]], neighbours: Neighbours) -> list[dict[str, Any]]:
    tables: list[dict[str, Any]] = []
    places: dict[str, dict[str, int]] = {}
    for split, rows in splits.items():
        keys = [duplicates.normal(text) for text in texts[split]]
        numbers = rows["row"]
        for against, there in places.items():
            tables.append(_table(split, against, zip(keys, numbers, texts[split], strict=True), there, neighbours))
        own: dict[str, int] = {}
        tables.append(_table(split, split, zip(keys, numbers, texts[split], strict=True), own, neighbours))
        places[split] = own
    return tables


def _table(split: str, against: str, rows: Any, there: dict[str, int], neighbours: Neighbours) -> dict[str, Any]:
    """Rows of a split against the texts of another (text -> its first row), or against its own earlier ones."""
    total, equal, near, examples = 0, 0, 0, []
    for key, number, text in rows:
        total += 1
        found = (
            [(there[key], 1.0)] if key in there else [(there[k], s) for k, s in neighbours.get(key, ()) if k in there]
        )
        if found:
            other, similarity = max(found, key=lambda pair: pair[1])
            equal, near = equal + (key in there), near + (key not in there)
            examples.append({"row": number, "other": other, "similarity": similarity, "text": text[:200]})
        if split == against:
            there.setdefault(key, number)
    examples.sort(key=lambda example: -example["similarity"])
    kept = [e for e in examples if e["similarity"] == 1][:EXAMPLES] + [e for e in examples if e["similarity"] < 1][
        :EXAMPLES
    ]
    return {"split": split, "against": against, "rows": total, "equal": equal, "near": near, "examples": kept}


def _conflicts(splits: dict[str, Rows], texts: dict[str, list[str]]) -> dict[str, Any]:
    labels: dict[str, list[tuple[str, str, int]]] = defaultdict(list)
    for split, rows in splits.items():
        if "label" not in rows.column_names:
            continue
        for text, label, number in zip(texts[split], rows["label"], rows["row"], strict=True):
            labels[duplicates.normal(text)].append((str(label), split, number))
    torn = {text: found for text, found in labels.items() if len({label for label, _, _ in found}) > 1}
    examples = [
        {
            "text": text[:200],
            "rows": [{"split": split, "row": number, "label": label} for label, split, number in found],
        }
        for text, found in list(torn.items())[:EXAMPLES]
    ]
    return {"texts": len(torn), "rows": sum(map(len, torn.values())), "examples": examples}
