"""What is in the splits of a picture task: sizes, oddities, copies across splits, doubtful labels, contact sheets."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from peftcli.data import inspect
from peftcli.data.images import likeness, places, sheet, suspects
from peftcli.data.images.decode import Animated, ImageProblem, look
from peftcli.data.images.prepared import source, workers
from peftcli.data.rows import Rows

EXAMPLES = 3
MOST_PICTURES = 20_000
"""Pictures of all splits together that are compared with each other."""
DOUBTFUL = 0.5
"""A label is listed where its neighbours outweigh it by this share."""
LOOK_ALIKE = 0.2
"""Where a larger share of rows has a near copy, the pictures are probably of one kind of thing."""
SHOWN = 24
ACROSS = 8

Labels = Callable[[Any], Iterable[str]]


@dataclass(frozen=True)
class _Seen:
    """A picture that could be decoded: where it is, and what is kept of it."""

    split: str
    place: int
    row: int
    name: str
    labels: tuple[str, ...]
    shape: tuple[int, int]
    oddities: tuple[str, ...]
    about: likeness.Print


def describe(
    splits: dict[str, Rows], labels: Labels, animated: Animated = "error"
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Everything that can be said of the pictures without a model.

    Args:
        splits: Rows with `image`, `label` and `row`, by train, validation and test, those there are.
        labels: Reads a cell of the column `label`.
        animated: As `decode.look`.

    Returns:
        `splits`: rows, labels, `width` and `height` (histograms in pixels), `oddities` by split. `problems`: by split
        the pictures that cannot be used, each row, name, kind and detail. `duplicates` and `leakage`: as in
        `peftcli.data.inspect.describe`, of pictures. `conflicts`: equal pictures with different labels. `suspects`:
        how many labels are in doubt, and the most doubtful. `notes`.

        Beside it contact sheets, PNG by what they show: classes, doubtful labels, copies across splits.
    """
    seen, problems, notes = _look_at_all(splits, labels, animated)
    names = list(splits)
    pairs = likeness.closest([one.about for one in seen], [names.index(one.split) for one in seen])
    doubts = _doubts(seen)
    counts = {
        split: Counter(label for cell in rows["label"] for label in labels(cell)) for split, rows in splits.items()
    }
    duplicates = _tables(splits, seen, pairs)
    if any(t["near"] > LOOK_ALIKE * t["rows"] for t in duplicates):
        notes.append(
            "many pictures are nearly equal to others: perhaps different things of one kind; look at the sheet"
        )
    found = {
        "splits": {split: _split(rows, counts[split], seen, split) for split, rows in splits.items()},
        "problems": problems,
        "duplicates": duplicates,
        "leakage": [
            f"{t['equal']} of {t['rows']} {t['split']} pictures are equal to a training picture, {t['near']} more "
            "nearly so"
            for t in duplicates
            if t["against"] == "train" != t["split"] and t["equal"] + t["near"]
        ],
        "conflicts": _conflicts(seen),
        "suspects": {"rows": len(doubts), "examples": [_doubt(seen, one) for one in doubts[:SHOWN]]},
        "notes": notes,
    }
    return found, _sheets(splits, seen, pairs, doubts)


def _look_at_all(
    splits: dict[str, Rows], labels: Labels, animated: Animated
) -> tuple[list[_Seen], dict[str, list[dict[str, Any]]], list[str]]:
    seen, notes = [], []
    problems: dict[str, list[dict[str, Any]]] = {}
    total, left = sum(map(len, splits.values())), MOST_PICTURES
    if total > left:
        notes.append(f"looked at {left} of {total} pictures")
    with ThreadPoolExecutor(workers()) as pool:
        for split, rows in splits.items():
            share = min(len(rows), -(-MOST_PICTURES * len(rows) // total), left)
            left -= share
            tasks = (
                (split, place, row, tuple(labels(row["label"])), animated) for place, row in enumerate(rows[:share])
            )
            for part in _parts(tasks, 256):
                for found in pool.map(lambda task: _look(*task), part):
                    if isinstance(found, _Seen):
                        seen.append(found)
                    else:
                        problems.setdefault(split, []).append(found)
    return seen, problems, notes


def _parts(items: Iterable[Any], size: int) -> Iterable[list[Any]]:
    part: list[Any] = []
    for item in items:
        part.append(item)
        if len(part) == size:
            yield part
            part = []
    yield part


def _look(
    split: str, place: int, row: dict[str, Any], labels: tuple[str, ...], animated: Animated
) -> _Seen | dict[str, Any]:
    name = places.name(row[places.COLUMN], row["row"])
    try:
        picture = look(source(row[places.COLUMN]), animated)
    except ImageProblem as problem:
        return {"row": row["row"], "name": name, "kind": problem.kind, "detail": problem.detail}
    height, width = picture.pixels_HWC.shape[:2]
    about = likeness.fingerprint(picture.pixels_HWC)
    return _Seen(split, place, row["row"], name, labels, (height, width), picture.oddities, about)


def _split(rows: Rows, counts: Counter[str], seen: list[_Seen], split: str) -> dict[str, Any]:
    own = [one for one in seen if one.split == split]
    return {
        "rows": len(rows),
        "labels": dict(counts.most_common()),
        "width": inspect.histogram(one.shape[1] for one in own),
        "height": inspect.histogram(one.shape[0] for one in own),
        "oddities": dict(Counter(odd for one in own for odd in one.oddities).most_common()),
    }


def _tables(splits: dict[str, Rows], seen: list[_Seen], pairs: list[likeness.Pair]) -> list[dict[str, Any]]:
    """For each split against those before it and itself: its pictures with an earlier equal or near one there."""
    found = []
    names = list(splits)
    for at, split in enumerate(names):
        for against in [*names[:at], split]:
            chosen = [p for p in pairs if seen[p.second].split == split and seen[p.first].split == against]
            chosen.sort(key=lambda p: (-p.similarity, p.second))
            equal = [p for p in chosen if p.similarity == 1]
            shown = equal[:EXAMPLES] + chosen[len(equal) : len(equal) + EXAMPLES]
            found.append(
                {
                    "split": split,
                    "against": against,
                    "rows": len(splits[split]),
                    "equal": len(equal),
                    "near": len(chosen) - len(equal),
                    "examples": [
                        {
                            "row": seen[p.second].row,
                            "other": seen[p.first].row,
                            "similarity": p.similarity,
                            "text": f"{seen[p.second].name} and {seen[p.first].name}",
                        }
                        for p in shown
                    ],
                }
            )
    return found


def _conflicts(seen: list[_Seen]) -> dict[str, Any]:
    groups: dict[int, list[int]] = defaultdict(list)
    for place, one in enumerate(seen):
        groups[one.about.digest].append(place)
    torn = [group for group in groups.values() if len({seen[i].labels for i in group}) > 1]
    examples = [
        {
            "text": seen[group[0]].name,
            "rows": [{"split": seen[i].split, "row": seen[i].row, "label": "|".join(seen[i].labels)} for i in group],
        }
        for group in torn[:EXAMPLES]
    ]
    return {"pictures": len(torn), "rows": sum(map(len, torn)), "examples": examples}


def _doubts(seen: list[_Seen]) -> list[suspects.Suspect]:
    """Labels in doubt, most doubtful first; none where rows have several labels."""
    if not seen or any(len(one.labels) != 1 for one in seen):
        return []
    cheap = suspects.features(np.stack([one.about.thumbnail_SSC for one in seen]))
    return [one for one in suspects.rank(cheap, [one.labels[0] for one in seen]) if one.doubt > DOUBTFUL]


def _doubt(seen: list[_Seen], found: suspects.Suspect) -> dict[str, Any]:
    one = seen[found.place]
    return {
        "split": one.split, "row": one.row, "name": one.name, "label": found.label, "likelier": found.likelier,
        "doubt": found.doubt,
    }  # fmt: skip


def _sheets(
    splits: dict[str, Rows], seen: list[_Seen], pairs: list[likeness.Pair], doubts: list[suspects.Suspect]
) -> dict[str, bytes]:
    def tile(one: _Seen, caption: str, mark: Any = "") -> sheet.Tile:
        picture = splits[one.split][one.place][places.COLUMN]
        return sheet.Tile(look(source(picture), "first").pixels_HWC, caption, mark)

    classes: dict[str, list[_Seen]] = defaultdict(list)
    for one in seen:
        if one.split == "train" and one.labels and len(classes[one.labels[0]]) < ACROSS:
            classes[one.labels[0]].append(one)
    crossing = sorted(
        (p for p in pairs if seen[p.first].split != seen[p.second].split), key=lambda p: (-p.similarity, p.second)
    )
    kinds = {
        "classes": [tile(one, f"{label}\nrow {one.row}") for label in sorted(classes) for one in classes[label]],
        "doubtful labels": [
            tile(seen[d.place], f"{seen[d.place].split} row {seen[d.place].row}\n{d.label}, or {d.likelier}?", "odd")
            for d in doubts[:SHOWN]
        ],
        "copies across splits": [
            tile(seen[i], f"{seen[i].split} row {seen[i].row}\n{100 * p.similarity:.1f} %", "wrong")
            for p in crossing[: SHOWN // 2]
            for i in (p.first, p.second)
        ],
    }
    return {kind: sheet.png(sheet.contact_sheet(tiles, columns=ACROSS)) for kind, tiles in kinds.items() if tiles}
