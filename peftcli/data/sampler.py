"""Which rows an optimiser step sees: a pure function of (seed, epoch, position).

Nothing here is advanced or restored. A resumed run asks for the next position, another number of processes shares
the same global batches out differently, and both see what an uninterrupted run in one process would have seen.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from functools import lru_cache

import numpy as np

MEGABATCH = 50
"""Batches among which rows are sorted by length: wide enough to find like lengths, narrow enough to stay random."""


def generator(*key: object) -> np.random.Generator:
    """A generator keyed by what it is for, for example `generator("order", seed, epoch)`; equal on every machine."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], np.uint64)))


class BatchSampler:
    """Global batches of an epoch: every row exactly once (but see `classes`), the last short batch kept.

    With `batch_tokens` the number of steps is the same in each epoch too: the lengths in a batch are drawn once per
    seed, and an epoch deals the rows anew among places of like length (within 1/16) and shuffles the batches.

    Args:
        lengths: Tokens of each row, or the number of rows where lengths play no part.
        batch_size: Rows of a batch, where `batch_tokens` is None.
        batch_tokens: Tokens of a batch at most, padding included; a single longer row is a batch of its own.
        group_by_length: Put rows of like length together.
        seed: The run's seed.
        classes: Class of each row, to have as many of each in an epoch: rows of a small class come several times, some
            of a large one wait for a later epoch. None takes every row once.
    """

    def __init__(
        self,
        lengths: list[int] | int,
        batch_size: int,
        batch_tokens: int | None = None,
        group_by_length: bool = False,
        seed: int = 0,
        classes: list[int] | None = None,
    ):
        if isinstance(lengths, int) and (batch_tokens or group_by_length):
            raise ValueError("batches by tokens or by length need the length of every row")
        self.lengths = np.ones(lengths, np.int64) if isinstance(lengths, int) else np.asarray(lengths, np.int64)
        if len(self.lengths) == 0:
            raise ValueError("no rows to draw batches from")
        self.batch_size, self.batch_tokens = batch_size, batch_tokens
        self.group_by_length, self.seed = group_by_length, seed
        self._members = _by_class(classes) if classes else None
        self._epoch = lru_cache(maxsize=2)(self._batches)
        self._pattern = self._places() if batch_tokens else None
        self.steps_per_epoch = len(self._pattern) if self._pattern else math.ceil(len(self.lengths) / batch_size)

    def batch(self, epoch: int, position: int) -> list[int]:
        """Rows of one optimiser step over all processes.

        Args:
            epoch: Pass over the rows, from 0.
            position: Step within the epoch, from 0 to `steps_per_epoch` - 1.
        """
        return self._epoch(epoch)[position].tolist()

    def at(self, step: int) -> list[int]:
        """Rows of the run's optimiser step `step`, from 0."""
        return self.batch(*divmod(step, self.steps_per_epoch))

    def total_steps(self, epochs: float) -> int:
        """Steps of so many passes, a part of a pass rounded up; at least one."""
        return max(1, math.ceil(round(epochs * self.steps_per_epoch, 6)))

    def share(self, rows: list[int], rank: int, world: int) -> list[int]:
        """The part of a global batch that one process computes, in the batch's order.

        The longest row goes first to the process with the fewest tokens so far, so the parts cost about the same.
        Their union is the batch; none is empty where there are at least as many rows as processes.
        """
        order = sorted(range(len(rows)), key=lambda place: (-self.lengths[rows[place]], place))
        loads = [(0, 0, other) for other in range(world)]
        mine = []
        for place in order:
            tokens, count, other = heapq.heappop(loads)
            if other == rank:
                mine.append(place)
            heapq.heappush(loads, (tokens + max(1, int(self.lengths[rows[place]])), count + 1, other))
        return [rows[place] for place in sorted(mine)]

    def _batches(self, epoch: int) -> list[np.ndarray]:
        draw = generator("order", self.seed, epoch)
        order = draw.permutation(len(self.lengths)) if self._members is None else self._balanced(draw, epoch)
        if self._pattern:
            order = order[np.argsort(_cost(self.lengths)[order], kind="stable")]
            return [order[self._pattern[i]] for i in draw.permutation(len(self._pattern))]
        if not self.group_by_length:
            return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        order = self._grouped(order, MEGABATCH * self.batch_size)
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        return [batches[i] for i in draw.permutation(len(batches))]

    def _balanced(self, draw: np.random.Generator, epoch: int) -> np.ndarray:
        """As many rows as there are, as many of each class as of any other, or one more."""
        assert self._members is not None
        least, more = divmod(len(self.lengths), len(self._members))
        larger = {(epoch + i) % len(self._members) for i in range(more)}
        taken = []
        for place, members in enumerate(self._members):
            wanted = least + (place in larger)
            rounds = [draw.permutation(members) for _ in range(-(-wanted // len(members)))]
            taken.append(np.concatenate(rounds)[:wanted])
        return draw.permutation(np.concatenate(taken))

    def _grouped(self, order: np.ndarray, size: int) -> np.ndarray:
        """Sort by falling length within stretches of `size` rows."""
        parts = [order[i : i + size] for i in range(0, len(order), size)]
        return np.concatenate([part[np.argsort(-self.lengths[part], kind="stable")] for part in parts])

    def _places(self) -> list[np.ndarray]:
        """Batches of places in the order of rising cost: the pattern that each epoch fills with other rows."""
        cost = _cost(self.lengths)
        order = generator("pattern", self.seed).permutation(len(cost))
        if self.group_by_length:
            typical = max(1, int(self.batch_tokens / cost.mean()))
            order = self._grouped(order, MEGABATCH * typical)
        place = np.empty(len(cost), np.int64)
        place[order[np.argsort(cost[order], kind="stable")]] = np.arange(len(cost))
        batches: list[np.ndarray] = []
        current: list[int] = []
        longest = 0
        for row in order:
            longest = max(longest, cost[row])
            if current and longest * (len(current) + 1) > self.batch_tokens:
                batches.append(place[current])
                current, longest = [], cost[row]
            current.append(row)
        return [*batches, place[current]]


def _by_class(classes: list[int]) -> list[np.ndarray]:
    """Rows of each class that there is."""
    of_row = np.asarray(classes)
    return [np.flatnonzero(of_row == one) for one in np.unique(of_row)]


def _cost(lengths: np.ndarray) -> np.ndarray:
    """Lengths rounded up to five significant bits, so that many rows can stand in for each other."""
    unit = 2 ** np.maximum(np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64) - 4, 0)
    return -(-np.maximum(lengths, 1) // unit) * unit
