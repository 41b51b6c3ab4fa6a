"""Equal and nearly equal texts, within splits and across them.

Near duplicates by MinHash (Broder, 1997) over shingles of three words: signatures that agree in a band of four
values are candidates, and each candidate's Jaccard similarity is then computed from the shingles themselves.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from peftcli.data.sampler import generator

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+")
"""A word; in scripts without spaces, a character."""
SHINGLE = 3
BANDS, BAND = 32, 4
"""Finds a pair of similarity 0.8 with probability 1 - (1 - 0.8^4)^32 = 1 - 5e-8."""
COMPARED = 20
"""Earlier texts of one band's bucket that a text is compared with: bounds the work where a template repeats."""


@dataclass(frozen=True)
class Pair:
    """Two nearly equal texts, by their positions in the list that was searched."""

    first: int
    second: int
    similarity: float


def normal(text: str) -> str:
    """The text without differences of case and white space."""
    return " ".join(text.casefold().split())


def near(texts: list[str], threshold: float = 0.8) -> list[Pair]:
    """Pairs of texts whose sets of shingles have a Jaccard similarity of at least `threshold`.

    Args:
        texts: Different texts; equal ones are better counted before.
        threshold: Least similarity, 0.6 or more (below that the bands miss pairs).

    Returns:
        Pairs with first < second. Each text has at least one pair with an earlier one where there is any, up to
        `COMPARED` texts in a bucket.
    """
    shingles = _shingles(texts)
    if not shingles:
        return []
    pairs = []
    for second, first in _candidates(_signatures(shingles)):
        shared = len(np.intersect1d(shingles[first], shingles[second], assume_unique=True))
        similarity = shared / (len(shingles[first]) + len(shingles[second]) - shared)
        if similarity >= threshold:
            pairs.append(Pair(first, second, round(similarity, 3)))
    return sorted(pairs, key=lambda pair: (pair.first, pair.second))


def _shingles(texts: list[str]) -> list[np.ndarray]:
    """The distinct shingles of each text as 64-bit hashes; a text of fewer words is one shingle."""
    known: dict[str, int] = {}
    draw = generator("shingles")
    factors = draw.integers(1, 2**63, SHINGLE, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    ids = [np.array([known.setdefault(w, len(known) + 1) for w in WORD.findall(t.casefold())], np.int64) for t in texts]
    codes = draw.integers(1, 2**63, len(known) + 2, dtype=np.uint64)
    found = []
    for words in ids:
        coded = codes[words] if len(words) else codes[:1]
        if len(coded) < SHINGLE:
            coded = np.concatenate([coded, np.zeros(SHINGLE - len(coded), np.uint64)])
        windows = np.lib.stride_tricks.sliding_window_view(coded, SHINGLE)
        found.append(np.unique((windows * factors).sum(axis=1, dtype=np.uint64)))
    return found


def _signatures(shingles: list[np.ndarray]) -> np.ndarray:
    """MinHash signatures, uint64 [texts, BANDS * BAND]."""
    flat = np.concatenate(shingles)
    starts = np.cumsum([0, *map(len, shingles[:-1])])
    draw = generator("minhash")
    out = np.empty((len(shingles), BANDS * BAND), np.uint64)
    for column in range(out.shape[1]):
        factor, shift = draw.integers(0, 2**63, 2, dtype=np.uint64)
        mixed = flat * (factor * np.uint64(2) + np.uint64(1)) + shift
        mixed ^= mixed >> np.uint64(29)
        out[:, column] = np.minimum.reduceat(mixed, starts)
    return out


def _candidates(signatures: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs (later, earlier) of texts that agree in at least one band, each once."""
    seen = set()
    for band in range(0, signatures.shape[1], BAND):
        _, bucket, sizes = np.unique(signatures[:, band : band + BAND], axis=0, return_inverse=True, return_counts=True)
        bucket = bucket.reshape(-1)
        members: dict[int, list[int]] = defaultdict(list)
        for text in np.flatnonzero(sizes[bucket] > 1).tolist():
            earlier = members[bucket[text]]
            for other in earlier[:COMPARED]:
                if (text, other) not in seen:
                    seen.add((text, other))
                    yield text, other
            earlier.append(text)
