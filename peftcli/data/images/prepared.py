"""Pictures decoded once and kept: the same pictures at the same size are read, not decoded again.

N pictures, S pixels a side.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import shutil
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
VERSION = 2
"""Raised when decoding or scaling changes, so that pictures kept by an older version are not used."""
MOST_BYTES = 4 * 2**30
"""Of larger splits it is kept which pictures cannot be used, and pixels are decoded anew whenever they are needed."""
MOST_KEPT = 5 * MOST_BYTES
"""Of all splits together; those that were not asked for longest go first."""
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
    pictures, shape = Rows(rows.table.select([COLUMN])), (len(rows), size, size, 3)
    about = f"{VERSION} {key} {animated} {_changed(pictures)} {pictures.fingerprint()}"
    place = paths.cache() / "pictures" / hashlib.sha256(about.encode()).hexdigest()
    kept, much = _read(place, shape), math.prod(shape)
    if kept is not None and (kept.pixels_NSSC is not None or much > MOST_BYTES):
        return kept
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if much > MOST_BYTES:
            return _written(_decode(pictures, fit, animated, None), place)
        if shutil.disk_usage(place.parent).free < 2 * much:  # a full disk would end the process without a word
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        handle, unfinished = tempfile.mkstemp(dir=place.parent, suffix=".unfinished")
        os.close(handle)
    except OSError as error:
        LOG.warning("decoded pictures are not kept for the next run: %s", error)
        return _decode(pictures, fit, animated, None if much > MOST_BYTES else np.zeros(shape, np.uint8))
    try:
        found = _decode(pictures, fit, animated, np.lib.format.open_memmap(unfinished, "w+", np.uint8, shape))
        assert isinstance(found.pixels_NSSC, np.memmap)
        found.pixels_NSSC.flush()
        os.replace(unfinished, place.with_suffix(".npy"))
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
    _tidy(place.parent)
    return _written(found, place)


def _changed(pictures: Rows) -> str:
    """When each file was written last: one may be drawn over, and its size, beginning and end stay the same."""
    files = [Path(picture["file"]) for picture in pictures[COLUMN] if picture and picture.get("file")]
    times = [file.stat().st_mtime_ns if file.exists() else 0 for file in files]
    return hashlib.sha256(repr(times).encode()).hexdigest()


def _written(found: Prepared, place: Path) -> Prepared:
    problems = {str(i): [p.kind, p.detail] for i, p in found.problems.items()}
    place.with_suffix(".json").write_text(json.dumps({"problems": problems, "oddities": found.oddities}))
    return found


def _tidy(folder: Path) -> None:
    """Remove what was not read for longest, down to `MOST_KEPT`."""
    total = 0
    for file in sorted(folder.glob("*.npy"), key=lambda file: -file.stat().st_mtime):
        total += file.stat().st_size
        if total > MOST_KEPT:
            file.unlink(missing_ok=True)
            file.with_suffix(".json").unlink(missing_ok=True)


def _decode(pictures: Rows, fit: Fit, animated: Animated, pixels_NSSC: np.ndarray | None) -> Prepared:
    found, odd = Prepared(pixels_NSSC), Counter[str]()

    def one(picture: dict[str, Any]) -> tuple[np.ndarray | None, tuple[str, ...]] | ImageProblem:
        try:
            seen = look(source(picture), animated)
            return None if pixels_NSSC is None else fit(seen.pixels_HWC), seen.oddities
        except ImageProblem as problem:
            return problem

    with ThreadPoolExecutor(workers()) as pool:
        for start in range(0, len(pictures), AT_ONCE):
            part = pictures[start : start + AT_ONCE][COLUMN]
            for place, result in enumerate(pool.map(one, part), start):
                if isinstance(result, ImageProblem):
                    found.problems[place] = result
                    continue
                if pixels_NSSC is not None:
                    pixels_NSSC[place] = result[0]
                odd.update(result[1])
    found.oddities = dict(odd)
    return found


def _read(place: Path, shape: tuple[int, ...]) -> Prepared | None:
    """What was kept, with pixels where there are any."""
    pixels_NSSC, pixels = None, place.with_suffix(".npy")
    try:
        about = json.loads(place.with_suffix(".json").read_text())
        problems = {int(i): ImageProblem(*told) for i, told in about["problems"].items()}
        if pixels.is_file():
            pixels_NSSC = np.load(pixels, mmap_mode="r")
            os.utime(pixels)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        LOG.warning("%s is damaged and is made anew: %s", place, error)
        return None
    fits = pixels_NSSC is None or pixels_NSSC.shape == shape
    return Prepared(pixels_NSSC, problems, about["oddities"]) if fits else None
