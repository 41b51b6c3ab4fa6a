"""Equal and nearly equal pictures, within splits and across them. N pictures, S the side of a thumbnail.

Candidates by a perceptual hash (signs of the lowest frequencies of the cosine transform, 64 bits; Zauner, 2010), each
pair then confirmed on small colour thumbnails, as wholes and in their worst corner. Found again: other encodings,
sizes, brightness and contrast. Not found: mirrored, turned or cropped pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
BLOCK = 512


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


def pairs(prints: list[Print]) -> Iterator[Pair]:
    """All pairs of pictures that are equal or nearly so, first < second, in order.

    They may be half the square of the pictures, where a camera sees one kind of thing: take as many as are needed.
    """
    for start, alike_BM in _blocks(prints):
        for row, column in np.argwhere(alike_BM >= 0).tolist():
            yield Pair(start + row, start + column, round(float(alike_BM[row, column]), 3))


def closest(prints: list[Print], groups: Sequence[int]) -> list[Pair]:
    """Of each picture and each group of earlier ones the pair that is most alike, the earliest of several; in order.

    Args:
        prints: The pictures.
        groups: Number of the group of each.
    """
    group_N = np.asarray(groups)
    best = {int(group): (np.full(len(prints), -1.0), np.zeros(len(prints), np.int64)) for group in np.unique(group_N)}
    for start, alike_BM in _blocks(prints):
        for group, (alike_N, first_N) in best.items():
            own = np.flatnonzero(group_N[start : start + len(alike_BM)] == group)
            if not len(own):
                continue
            most = own[alike_BM[own].argmax(axis=0)]
            value_M = alike_BM[most, np.arange(alike_BM.shape[1])]
            better = start + np.flatnonzero(value_M > alike_N[start:])
            alike_N[better], first_N[better] = value_M[better - start], start + most[better - start]
    found = [
        Pair(int(first_N[second]), int(second), round(float(alike_N[second]), 3))
        for alike_N, first_N in best.values()
        for second in np.flatnonzero(alike_N >= 0)
    ]
    return sorted(found, key=lambda pair: (pair.first, pair.second))


def _blocks(prints: list[Print]) -> Iterator[tuple[int, np.ndarray]]:
    """A stretch of pictures at a time, and how alike they are to those from its start on, [B, M]; -1 is no pair.

    Every hash is compared with every other, and the thumbnails of those that are close, as products of matrices.
    """
    if not prints:
        return
    bits_N = np.array([one.bits for one in prints], np.uint64)
    digests_N = np.array([one.digest for one in prints], np.uint64)
    parts_KND = _parts(np.stack([one.thumbnail_SSC for one in prints]))
    for start in range(0, len(prints), BLOCK):
        rows = slice(start, start + BLOCK)
        apart_BM = np.bitwise_count(bits_N[rows, None] ^ bits_N[None, start:])
        same_BM = digests_N[rows, None] == digests_N[None, start:]
        close_BM = np.triu((apart_BM <= FARTHEST) | same_BM, 1)
        found_BM = np.full(close_BM.shape, -1, np.float32)
        here, there = np.flatnonzero(close_BM.any(1)), np.flatnonzero(close_BM.any(0))
        if len(here):
            some = np.ix_(here, there)
            alike, worst = _compare(parts_KND[:, start + here], parts_KND[:, start + there])
            near = close_BM[some] & (alike >= CLOSEST) & (worst <= WORST)
            alike = np.where(same_BM[some] & close_BM[some], 1, np.where(near, np.minimum(alike, 0.999), -1))
            found_BM[some] = alike
        yield start, found_BM


def _compare(one_KBD: np.ndarray, other_KMD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Correlation of each of some pictures with each of others, and the largest difference of a part, [B, M] each."""
    total_BM, worst_BM = np.float32(0), np.float32(0)
    for one_BD, other_MD in zip(one_KBD, other_KMD, strict=True):
        apart_BM = one_BD @ other_MD.T
        apart_BM *= -2
        apart_BM += (one_BD**2).sum(1)[:, None]
        apart_BM += (other_MD**2).sum(1)
        total_BM, worst_BM = total_BM + apart_BM, np.maximum(worst_BM, apart_BM)
    K, _, D = one_KBD.shape
    return 1 - total_BM / (2 * K * D), np.sqrt(worst_BM / D)


def _parts(thumbnails_NSSC: np.ndarray) -> np.ndarray:
    """Thumbnails with light and contrast levelled, cut into parts: [K, N, D] of K parts with D numbers."""
    size = SIDE // CORNERS
    cut = _level(thumbnails_NSSC).reshape(-1, CORNERS, size, CORNERS, size, 3).transpose(1, 3, 0, 2, 4, 5)
    return np.ascontiguousarray(cut.reshape(CORNERS**2, len(thumbnails_NSSC), size * size * 3))


def _level(thumbnail_PSSC: np.ndarray) -> np.ndarray:
    """Mean 0 and spread 1 over a picture; one of a single colour keeps it, to be told from another colour."""
    values = thumbnail_PSSC.astype(np.float32)
    mean, spread = values.mean(axis=(1, 2, 3), keepdims=True), values.std(axis=(1, 2, 3), keepdims=True)
    return np.where(spread < FLAT, values / 32, (values - mean) / np.maximum(spread, FLAT))
