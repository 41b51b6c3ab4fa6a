"""Training rows that are read while training: in a fixed order, from any position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from peftcli.config.errors import Mistake, UserError
from peftcli.data.checking import problem, way_out
from peftcli.data.origin import Origin
from peftcli.data.sampler import generator

WINDOW = 1000
"""Rows that are shuffled among themselves: all that is held in memory."""


class Stream:
    """Rows of a source too large to hold.

    Attributes:
        column_names: What a row holds.
        skipped: Bad rows left out in the latest pass so far, with `data.bad_rows=skip`.
    """

    def __init__(self, origin: Origin, mapping: dict[str, str], needed: list[str], bad_rows: str, limit: int | None):
        self.origin, self.mapping, self.needed = origin, mapping, needed
        self.bad_rows, self.limit, self.skipped = bad_rows, limit, 0
        self.column_names = [*mapping, "row"]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """One pass in the source's order.

        Raises:
            UserError: A bad row, unless they are skipped.
        """
        return islice(self._pass(), self.limit)

    def head(self, count: int) -> list[dict[str, Any]]:
        """The first rows, in the source's order: to learn labels from, to show."""
        return list(islice(self, count))

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[list[dict[str, Any]]]:
        """Global batches without end, each pass over the source in another order.

        Args:
            batch_size: Rows of an optimiser step over all processes.
            seed: The run's seed.
            start: Step to begin with, from 0: what comes is what would have come there without a break. The rows
                before it are read and dropped.
        """
        rows = self._shuffled(seed, start * batch_size)
        while True:
            yield list(islice(rows, batch_size))

    def fingerprint(self) -> str:
        """What is known without reading it all: sizes and beginnings of files, or the hub's name and revision."""
        return f"{self.origin.identity()} limit={self.limit}"

    def _pass(self) -> Iterator[dict[str, Any]]:
        self.skipped = 0
        for number, (where, row) in enumerate(self.origin.lines(self.mapping)):
            bad = row if isinstance(row, Mistake) else problem(row, self.mapping, self.needed, where)
            if not bad:
                yield {**row, "row": number}  # type: ignore[dict-item]
            elif self.bad_rows == "error":
                raise UserError(replace(bad, hint=way_out(bad)))
            else:
                self.skipped += 1

    def _shuffled(self, seed: int, start: int) -> Iterator[dict[str, Any]]:
        epoch = 0
        while True:
            rows, window = iter(self), 0
            while block := list(islice(rows, WINDOW)):
                if start >= len(block):
                    start -= len(block)
                else:
                    order = generator("stream", seed, epoch, window).permutation(len(block))
                    yield from (block[i] for i in order[start:])
                    start = 0
                window += 1
            if window == 0:
                raise UserError(Mistake("train has no usable row", self.origin.where))
            epoch += 1
