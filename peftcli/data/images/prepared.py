"""Pictures decoded once and kept: the same pictures at the same size are read, not decoded again.

N pictures, S pixels a side.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from peftcli.config import paths
from peftcli.data.images.decode import Animated, ImageProblem, look
from peftcli.data.images.places import COLUMN
from peftcli.data.rows import Rows

LOG = logging.getLogger(__name__)
VERSION = 1
"""Raised when decoding or scaling changes, so that pictures kept by an older version are not used."""
MOST_BYTES = 4 * 2**30
"""Larger splits are decoded anew whenever a picture is needed, rather than fill the disk."""
AT_ONCE = 256

Fit = Callable[[np.ndarray], np.ndarray]


@dataclass
class Prepared:
    """The pictures of a split.

    Attributes:
        pixels_NSSC: uint8 [N, S, S, 3], read from disk as it is used; None where there are too many to keep.
        problems: What is wrong with the pictures that cannot be used, by position; their pixels are zero.
        oddities: How many were grey, rotated and so on.
    """

    pixels_NSSC: np.ndarray | None
    problems: dict[int, ImageProblem] = field(default_factory=dict)
    oddities: dict[str, int] = field(default_factory=dict)


def source(picture: dict[str, Any]) -> bytes | str:
    """A row's picture as `decode` reads it."""
    return picture["bytes"] if picture.get("bytes") is not None else picture.get("file") or picture["path"]


def workers() -> int:
    """Threads that decode: Pillow lets go of the interpreter while it works."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def prepare(rows: Rows, fit: Fit, size: int, key: str, animated: Animated = "error") -> Prepared:
    """Decode and scale every picture of a split, or read what was kept of it.

    Args:
        rows: With the column `image`.
        fit: From a picture of any size to uint8 [S, S, 3].
        size: S.
        key: All that `fit` depends on.
        animated: As `decode.look`.
    """
    if len(rows) * size * size * 3 > MOST_BYTES:
        return Prepared(None)
    pictures = Rows(rows.table.select([COLUMN]))
    name = hashlib.sha256(f"{VERSION} {key} {animated} {pictures.fingerprint()}".encode()).hexdigest()
    place = paths.cache() / "pictures" / name
    shape = (len(rows), size, size, 3)
    if (kept := _read(place, shape)) is not None:
        return kept
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=place.parent, suffix=".unfinished")
        os.close(handle)
    except OSError as error:
        LOG.warning("decoded pictures are not kept for the next run: %s", error)
        return _decode(pictures, fit, animated, np.zeros(shape, np.uint8))
    try:
        found = _decode(pictures, fit, animated, np.lib.format.open_memmap(unfinished, "w+", np.uint8, shape))
        assert isinstance(found.pixels_NSSC, np.memmap)
        found.pixels_NSSC.flush()
        problems = {str(i): [p.kind, p.detail] for i, p in found.problems.items()}
        place.with_suffix(".json").write_text(json.dumps({"problems": problems, "oddities": found.oddities}))
        os.replace(unfinished, place.with_suffix(".npy"))
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
    return found


def _decode(pictures: Rows, fit: Fit, animated: Animated, pixels_NSSC: np.ndarray) -> Prepared:
    found, odd = Prepared(pixels_NSSC), Counter[str]()

    def one(picture: dict[str, Any]) -> tuple[np.ndarray, tuple[str, ...]] | ImageProblem:
        try:
            seen = look(source(picture), animated)
            return fit(seen.pixels_HWC), seen.oddities
        except ImageProblem as problem:
            return problem

    with ThreadPoolExecutor(workers()) as pool:
        for start in range(0, len(pictures), AT_ONCE):
            part = pictures[start : start + AT_ONCE][COLUMN]
            for place, result in enumerate(pool.map(one, part), start):
                if isinstance(result, ImageProblem):
                    found.problems[place] = result
                    continue
                pixels_NSSC[place] = result[0]
                odd.update(result[1])
    found.oddities = dict(odd)
    return found


def _read(place: Path, shape: tuple[int, ...]) -> Prepared | None:
    try:
        pixels_NSSC = np.load(place.with_suffix(".npy"), mmap_mode="r")
        about = json.loads(place.with_suffix(".json").read_text())
        problems = {int(i): ImageProblem(*told) for i, told in about["problems"].items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        LOG.warning("%s is damaged and is made anew: %s", place, error)
        return None
    return Prepared(pixels_NSSC, problems, about["oddities"]) if pixels_NSSC.shape == shape else None
