"""Labels that a picture's nearest neighbours contradict. N pictures, F features, K neighbours.

No picture is its own neighbour, so every judgement is out of sample. What stands out is a doubt, not a verdict: rare
kinds of a class are ranked high too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NEIGHBOURS = 10
BLOCK = 512


@dataclass(frozen=True)
class Suspect:
    """A label in doubt.

    Attributes:
        place: Position of the picture in the list that was searched.
        label: Its label.
        likelier: The label that most of its nearest neighbours have.
        doubt: Weight of the neighbours with `likelier` minus that of those with `label`, over all; -1 to 1.
    """

    place: int
    label: str
    likelier: str
    doubt: float


def features(thumbnails_NSSC: np.ndarray, side: int = 16) -> np.ndarray:
    """Cheap features of RGB thumbnails, uint8 [N, S, S, 3]: coarser pixels of mean 0 and length 1, float32 [N, F]."""
    count, full = thumbnails_NSSC.shape[:2]
    step = full // side
    coarse = thumbnails_NSSC.astype(np.float32).reshape(count, side, step, side, step, 3).mean(axis=(2, 4))
    flat_NF = coarse.reshape(count, -1)
    flat_NF -= flat_NF.mean(axis=1, keepdims=True)
    return flat_NF / np.maximum(np.linalg.norm(flat_NF, axis=1, keepdims=True), 1e-6)


def rank(features_NF: np.ndarray, labels: Sequence[str]) -> list[Suspect]:
    """Every picture, the most doubtful label first; ties in the order given.

    A neighbour weighs as much as it is near (the inverse of its squared distance), and classes weigh the same whatever
    their number of pictures, so that a rare class is not in doubt for being rare.

    Args:
        features_NF: One row a picture: `features`, or what a trained model makes of it.
        labels: Theirs.
    """
    names, codes_N = np.unique(np.asarray(labels, dtype=object).astype(str), return_inverse=True)
    if len(names) < 2:
        return []
    counts_C = np.bincount(codes_N)
    votes_NC = np.zeros((len(codes_N), len(names)), np.float64)
    neighbours = min(NEIGHBOURS, len(codes_N) - 1)
    for start in range(0, len(codes_N), BLOCK):
        near_BK, distance_BK = _nearest(features_NF, start, neighbours)
        weight_BK = 1 / (distance_BK + 1e-3) / np.sqrt(counts_C[codes_N[near_BK]])
        rows_BK = np.broadcast_to(np.arange(start, start + len(near_BK))[:, None], near_BK.shape)
        np.add.at(votes_NC, (rows_BK, codes_N[near_BK]), weight_BK)
    votes_NC /= votes_NC.sum(axis=1, keepdims=True)
    every = np.arange(len(codes_N))
    own_N = votes_NC[every, codes_N]
    others_NC = votes_NC.copy()
    others_NC[every, codes_N] = -1
    likelier_N = others_NC.argmax(axis=1)
    doubt_N = others_NC[every, likelier_N] - own_N
    order = np.argsort(-doubt_N, kind="stable").tolist()
    return [Suspect(i, names[codes_N[i]], names[likelier_N[i]], round(float(doubt_N[i]), 4)) for i in order]


def _nearest(features_NF: np.ndarray, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and squared distances of the nearest others of a block of rows, [B, K] each."""
    block = features_NF[start : start + BLOCK]
    lengths_N = (features_NF**2).sum(axis=1)
    distance_BN = lengths_N[start : start + BLOCK, None] + lengths_N[None] - 2 * block @ features_NF.T
    distance_BN[np.arange(len(block)), np.arange(start, start + len(block))] = np.inf
    near_BK = np.argpartition(distance_BN, count - 1, axis=1)[:, :count]
    return near_BK, np.maximum(np.take_along_axis(distance_BN, near_BK, axis=1), 0)
