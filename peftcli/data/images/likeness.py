"""Equal and nearly equal pictures, within splits and across them. N pictures, P pairs, S the side of a thumbnail.

Candidates by a perceptual hash (signs of the lowest frequencies of the cosine transform, 64 bits; Zauner, 2010), each
pair then confirmed on small colour thumbnails, as wholes and in their worst corner. Found again: other encodings,
sizes, brightness and contrast. Not found: mirrored, turned or cropped pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash
from PIL import Image

LOW = 8
SIDE = 32
FARTHEST = 14
"""Bits in which the hashes of a pair may differ."""
CLOSEST = 0.97
"""Least correlation of a pair's thumbnails."""
CORNERS, WORST = 8, 0.4
"""Of so many by so many parts, none may differ by more than this share of the picture's own spread: two clocks, equal
but for their hands, correlate as a picture does with its re-encoding."""
FLAT = 4.0
"""Spread of grey levels below which a picture is one colour and has no structure to compare."""
BLOCK = 1024


@dataclass(frozen=True)
class Print:
    """What is kept of a picture to compare it by.

    Attributes:
        digest: Hash of its size and pixels.
        bits: Perceptual hash, 64 bits.
        thumbnail_SSC: RGB, uint8 [S, S, 3].
    """

    digest: int
    bits: int
    thumbnail_SSC: np.ndarray


@dataclass(frozen=True)
class Pair:
    """Two equal or nearly equal pictures, by their positions in the list that was searched.

    Attributes:
        first: The earlier one.
        second: The later one.
        similarity: 1.0 where size and pixels are equal, else the correlation of the thumbnails, at most 0.999.
    """

    first: int
    second: int
    similarity: float


def fingerprint(pixels_HWC: np.ndarray) -> Print:
    """The print of an RGB picture, uint8 [H, W, 3]."""
    from scipy.fft import dctn

    image = Image.fromarray(pixels_HWC)
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
    low = dctn(grey, norm="ortho")[:LOW, :LOW].ravel()
    low[0] = 0  # the mean: brightness
    bits = int.from_bytes(np.packbits(low > np.median(low[1:])).tobytes(), "big")
    thumbnail_SSC = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))
    return Print(xxhash.xxh64_intdigest(repr(pixels_HWC.shape).encode() + pixels_HWC.tobytes()), bits, thumbnail_SSC)


def near(prints: list[Print]) -> list[Pair]:
    """`pairs` as a list."""
    return list(pairs(prints))


def pairs(prints: list[Print]) -> Iterator[Pair]:
    """All pairs of pictures that are equal or nearly so, first < second, in order.

    Every hash is compared with every other: seconds for 50,000 pictures.
    """
    if not prints:
        return
    bits_N = np.array([one.bits for one in prints], np.uint64)
    digests_N = np.array([one.digest for one in prints], np.uint64)
    thumbnails = np.stack([one.thumbnail_SSC for one in prints])
    for first_P, second_P in _candidates(bits_N):
        same_P = digests_N[first_P] == digests_N[second_P]
        alike_P, worst_P = _compare(thumbnails[first_P], thumbnails[second_P])
        alike_P = np.where(same_P, 1.0, np.minimum(alike_P, 0.999))
        kept = np.flatnonzero(same_P | ((alike_P >= CLOSEST) & (worst_P <= WORST)))
        found = zip(first_P[kept].tolist(), second_P[kept].tolist(), alike_P[kept].tolist(), strict=True)
        yield from (Pair(first, second, round(similarity, 3)) for first, second, similarity in found)


def _candidates(bits_N: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs whose hashes are close, in order, at most `BLOCK` at once."""
    for start in range(0, len(bits_N), BLOCK):
        apart = np.bitwise_count(bits_N[start : start + BLOCK, None] ^ bits_N[None, start:])
        first, second = np.nonzero(apart <= FARTHEST)
        first, second = first[first < second] + start, second[first < second] + start
        for at in range(0, len(first), BLOCK):
            yield first[at : at + BLOCK], second[at : at + BLOCK]


def _compare(one_PSSC: np.ndarray, other_PSSC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Correlation of the thumbnails [P], and the largest difference of a part after light and contrast are levelled."""
    difference = _level(one_PSSC) - _level(other_PSSC)
    size = SIDE // CORNERS
    parts = (difference**2).reshape(-1, CORNERS, size, CORNERS, size, 3).mean(axis=(2, 4, 5))
    return 1 - (difference**2).mean(axis=(1, 2, 3)) / 2, np.sqrt(parts.max(axis=(1, 2)))


def _level(thumbnail_PSSC: np.ndarray) -> np.ndarray:
    """Mean 0 and spread 1 over a picture; one of a single colour keeps it, to be told from another colour."""
    values = thumbnail_PSSC.astype(np.float32)
    mean, spread = values.mean(axis=(1, 2, 3), keepdims=True), values.std(axis=(1, 2, 3), keepdims=True)
    return np.where(spread < FLAT, values / 32, (values - mean) / np.maximum(spread, FLAT))
