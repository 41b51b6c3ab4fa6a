"""Copies among the pictures of a data set: which belong together, and which cross splits. N pictures, S pixels a side.

Several photographs of one thing are one case: with some of them in training and others in the test, a model is asked
what it has been told.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from peftcli.config import paths
from peftcli.data.images import likeness
from peftcli.data.images.decode import ImageProblem, read
from peftcli.data.images.likeness import SIDE, Print
from peftcli.data.images.places import COLUMN, name
from peftcli.data.images.prepared import source, workers
from peftcli.data.rows import Rows

LOG = logging.getLogger(__name__)
VERSION = 1
"""Raised when prints change, so that those kept by an older version are not used."""
MOST_PICTURES = 20_000
"""Of all splits together; more are not compared."""
LARGEST, LARGEST_SHARE = 10, 0.1
"""Near copies of near copies in one group: where they are more, and more than this share of all pictures, the camera
sees one kind of thing again and again, and only equal pictures count as copies."""
NAMED = 3


def groups(rows: Rows, notes: list[str]) -> list[list[int]]:
    """Rows, by position, whose pictures are copies of each other, at least two in a group.

    Args:
        rows: With the column `image`; pictures that cannot be decoded are in no group.
        notes: Gets what was found.
    """
    if _too_many(len(rows), notes):
        return []
    found, alike = _together(prints(rows))
    if found:
        count = sum(map(len, found))
        kind = "equal pictures" if alike else "nearly equal pictures"
        many = f"{len(found)} groups stay" if len(found) > 1 else "one group stay"
        more = " (so many look alike that near copies are taken for different things)" if alike else ""
        notes.append(f"{count} {kind} in {many} together when rows are set aside{more}")
    return found


def crossing(splits: dict[str, Rows], notes: list[str]) -> None:
    """Note the pictures of the other splits that are copies of a training picture.

    Args:
        splits: Training rows first, then those that the source itself holds out.
        notes: Gets what was found.
    """
    if len(splits) < 2 or _too_many(sum(map(len, splits.values())), notes):
        return
    places = [(split, i) for split, rows in splits.items() for i in range(len(rows))]
    found, alike = _together([one for rows in splits.values() for one in prints(rows)])
    twins: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for members in found:
        split, original = places[members[0]]
        if split == "train":
            for other, copy in (places[i] for i in members):
                if other != "train":
                    twins[other].append((copy, original))
    for split, pairs in twins.items():
        named = [f"{_name(splits[split], copy)} = {_name(splits['train'], one)}" for copy, one in pairs[:NAMED]]
        more = [f"and {len(pairs) - NAMED} more (peft data shows them)"] if len(pairs) > NAMED else []
        kind = "equal to" if alike else "copies of"
        what = f"leak: {len(pairs)} of {len(splits[split])} {split} pictures are {kind} training pictures"
        notes.append(f"{what}, which flatters what is measured there: {', '.join([*named, *more])}")


def _too_many(count: int, notes: list[str]) -> bool:
    told = f"pictures are not compared with each other for copies: there are more than {MOST_PICTURES:,}"
    if count > MOST_PICTURES and told not in notes:
        notes.append(told)
    return count > MOST_PICTURES


def _name(rows: Rows, place: int) -> str:
    row = rows[place]
    return name(row[COLUMN], row["row"])


def _together(found: list[Print | None]) -> tuple[list[list[int]], bool]:
    """Positions of copies in groups, each in order, and whether so many look alike that only equal ones count."""
    kept = [i for i, one in enumerate(found) if one is not None]
    there = [one for one in found if one is not None]
    equal = defaultdict(list)
    for place, picture in zip(kept, there, strict=True):
        equal[picture.digest].append(place)
    same = [members for members in equal.values() if len(members) > 1]
    owner = {i: members for members in same for i in members}
    for pair in likeness.pairs(there):
        first, second = kept[pair.first], kept[pair.second]
        one, other = owner.get(first, [first]), owner.get(second, [second])
        if one is not other:
            joined = sorted([*one, *other])
            if len(joined) > max(LARGEST, LARGEST_SHARE * len(there)):  # at once: all pairs would be too many
                return same, True
            owner |= dict.fromkeys(joined, joined)
    return sorted({id(members): members for members in owner.values()}.values()), False


def prints(rows: Rows) -> list[Print | None]:
    """What the pictures are compared by, made once and kept; None where one cannot be decoded."""
    pictures = Rows(rows.table.select([COLUMN]))
    key = hashlib.sha256(f"{VERSION} {pictures.fingerprint()}".encode()).hexdigest()
    place = paths.cache() / "prints" / f"{key}.npz"
    if (kept := _read(place)) is not None:
        return kept
    found: list[Print | None] = []
    with ThreadPoolExecutor(workers()) as pool:
        for start in range(0, len(pictures), 256):
            found += pool.map(_print, pictures[start : start + 256][COLUMN])
    _keep(place, found)
    return found


def _print(picture: dict[str, Any]) -> Print | None:
    try:
        return likeness.fingerprint(read(source(picture), "first"))
    except ImageProblem:
        return None


def _read(place: Path) -> list[Print | None] | None:
    try:
        with np.load(place) as file:
            rows = zip(file["digest"].tolist(), file["bits"].tolist(), file["thumbnail"], file["there"], strict=True)
            return [Print(digest, bits, small) if there else None for digest, bits, small, there in rows]
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged archive raises BadZipFile, ValueError, KeyError, EOFError, zlib.error
        LOG.warning("%s is damaged and is made anew: %s", place, error)
        return None


def _keep(place: Path, found: list[Print | None]) -> None:
    empty = Print(0, 0, np.zeros((SIDE, SIDE, 3), np.uint8))
    whole = [one or empty for one in found]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=place.parent, suffix=".unfinished")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(
                    file, digest=np.array([one.digest for one in whole], np.uint64),
                    bits=np.array([one.bits for one in whole], np.uint64),
                    thumbnail=np.stack([one.thumbnail_SSC for one in whole]),
                    there=np.array([one is not None for one in found]),
                )  # fmt: skip
            os.replace(unfinished, place)
        except BaseException:
            Path(unfinished).unlink(missing_ok=True)
            raise
    except OSError as error:
        LOG.warning("what pictures are compared by is not kept for the next run: %s", error)
