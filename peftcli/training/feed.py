"""Which encoded rows a process sees at an optimiser step: a pure function of (seed, epoch, position)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from peftcli.config.schema import RunConfig, TrainingConfig
from peftcli.data.collate import IGNORE, MULTIPLE, pad
from peftcli.data.sampler import BatchSampler
from peftcli.data.stream import Stream
from peftcli.tasks.contract import Encoded, Task

Batch = dict[str, torch.Tensor]


def cut(rows: list[dict[str, Any]], size: int | None, pad_id: int) -> list[Batch]:
    """Rows as micro-batches of at most `size` rows, each padded to its own longest."""
    size = size or len(rows)
    return [pad(rows[i : i + size], pad_id, multiple=MULTIPLE) for i in range(0, len(rows), size)]


def nothing_to_learn(batches: list[Batch]) -> list[Batch]:
    """For a process that a batch has no row for: it still takes part in the gradient's reduction."""
    for batch in batches:
        batch["labels"].fill_(IGNORE)
    return batches


class Feed:
    """Micro-batches of this process from encoded rows in memory.

    Args:
        encoded: The training rows.
        sampler: Global batches by (epoch, position).
        config: For `micro_batch_size`.
        pad_id: Token that fills up short rows.
        rank: This process.
        world: Number of processes.
    """

    def __init__(
        self, encoded: Encoded, sampler: BatchSampler, config: TrainingConfig, pad_id: int, rank: int, world: int
    ):
        self.encoded, self.sampler, self.pad_id, self.rank, self.world = encoded, sampler, pad_id, rank, world
        self.micro = config.micro_batch_size
        self.steps_per_epoch = sampler.steps_per_epoch

    def micro_batches(self, epoch: int, position: int) -> list[Batch]:
        """This process's share of the batch at a place, cut into micro-batches; at least one."""
        whole = self.sampler.batch(epoch, position)
        mine = self.sampler.share(whole, self.rank, self.world)
        batches = cut(self.encoded.take(mine or whole[:1]), self.micro, self.pad_id)
        return batches if mine else nothing_to_learn(batches)

    def probe(self, position: int) -> Iterator[Batch]:
        """A row or two of a batch, the same in every process, to try the model on."""
        yield pad(self.encoded.take(self.sampler.batch(0, position)[:1]), self.pad_id)

    def whole(self, position: int) -> list[Batch]:
        """A batch of the first epoch, the same in every process, cut into micro-batches."""
        return cut(self.encoded.take(self.sampler.batch(0, position)), self.micro, self.pad_id)


class StreamFeed:
    """Micro-batches of this process from rows that are read and encoded while training.

    The run is one long epoch. Places must be asked for in rising order; the first may be anywhere.
    """

    def __init__(
        self, stream: Stream, task: Task, tokenizer: Any, config: RunConfig, pad_id: int, rank: int, world: int
    ):
        self.stream, self.task, self.tokenizer, self.pad_id = stream, task, tokenizer, pad_id
        self.rank, self.world, self.seed = rank, world, config.seed
        self.size, self.micro = config.training.batch_size, config.training.micro_batch_size
        self.steps_per_epoch = config.training.max_steps or 1
        self._next = -1
        self._rows: Iterator[list[dict[str, Any]]] = iter(())

    def micro_batches(self, epoch: int, position: int) -> list[Batch]:
        """As `Feed.micro_batches`."""
        if position != self._next:
            self._rows = self.stream.batches(self.size, self.seed, start=position)
        self._next = position + 1
        whole = self._encoded(next(self._rows))
        mine = whole[self.rank :: self.world]
        batches = cut(mine or whole[:1], self.micro, self.pad_id)
        return batches if mine else nothing_to_learn(batches)

    def probe(self, position: int) -> Iterator[Batch]:
        """As `Feed.probe`."""
        yield pad(self._encoded(self.stream.head(position + 1)[-1:]), self.pad_id)

    def whole(self, position: int) -> list[Batch]:
        """As `Feed.whole`."""
        rows = self.stream.head((position + 1) * self.size)[position * self.size :]
        return cut(self._encoded(rows), self.micro, self.pad_id)

    def _encoded(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found = [self.task.encode(row, self.tokenizer) for row in rows]
        return [row for row in found if row["input_ids"]] or [{"input_ids": [self.pad_id], "labels": [IGNORE]}]


AnyFeed = Feed | StreamFeed
