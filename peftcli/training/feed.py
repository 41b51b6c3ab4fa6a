"""Which encoded rows a process sees at an optimiser step: a pure function of (seed, epoch, position)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from peftcli.config.schema import RunConfig
from peftcli.data.collate import IGNORE
from peftcli.data.sampler import BatchSampler
from peftcli.data.stream import Stream
from peftcli.tasks.contract import Encoded, Task

Batch = dict[str, torch.Tensor]


def rows_of(batch: Batch) -> int:
    """How many rows there are in a batch."""
    return len(batch["labels"])


def tokens_of(batch: Batch) -> int:
    """How many tokens, padding left out; pictures have none."""
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else 0


def nothing_to_learn(batches: list[Batch]) -> list[Batch]:
    """For a process that a batch has no row for: it still takes part in the gradient's reduction."""
    for batch in batches:
        batch["labels"].fill_(IGNORE)
    return batches


def as_many(batches: list[Batch], count: int) -> list[Batch]:
    """With batches to learn nothing from up to so many, for a model that all processes have to pass through together."""
    more = [{name: tensor.clone() for name, tensor in batches[-1].items()} for _ in range(count - len(batches))]
    return batches + nothing_to_learn(more)


class _Micro:
    """Rows as micro-batches of the recipe's size."""

    def __init__(self, task: Task, tokenizer: Any, config: RunConfig):
        self.task, self.tokenizer, self.seed = task, tokenizer, config.seed
        self.micro = config.training.micro_batch_size

    def cut(self, rows: list[dict[str, Any]], epoch: int | None = None) -> list[Batch]:
        """At most `micro_batch_size` rows each, as the task collates them; what an epoch draws is drawn where it is
        named."""
        size = self.micro or len(rows)
        draw = None if epoch is None else (self.seed, epoch)
        return [self.task.collate(rows[i : i + size], self.tokenizer, draw) for i in range(0, len(rows), size)]

    def one(self, rows: list[dict[str, Any]]) -> Batch:
        """A row or two, not padded beyond their own length."""
        return self.task.collate(rows, self.tokenizer, multiple=1)


class Feed(_Micro):
    """Micro-batches of this process from encoded rows in memory.

    Args:
        encoded: The training rows.
        sampler: Global batches by (epoch, position).
        task: Collates them.
        tokenizer: The model's.
        config: The run's.
        rank: This process.
        world: Number of processes.
    """

    def __init__(
        self, encoded: Encoded, sampler: BatchSampler, task: Task, tokenizer: Any, config: RunConfig, rank: int,
        world: int,
    ):  # fmt: skip
        super().__init__(task, tokenizer, config)
        self.encoded, self.sampler, self.rank, self.world = encoded, sampler, rank, world
        self.steps_per_epoch = sampler.steps_per_epoch

    def use(self, encoded: Encoded) -> None:
        """Take the rows from here: the same ones in the same order, in another form."""
        self.encoded = encoded

    def micro_batches(self, epoch: int, position: int) -> list[Batch]:
        """This process's share of the batch at a place, cut into micro-batches; at least one."""
        whole = self.sampler.batch(epoch, position)
        mine = self.sampler.share(whole, self.rank, self.world)
        batches = self.cut(self._taken(mine or whole[:1], whole, epoch, position), epoch)
        return batches if mine else nothing_to_learn(batches)

    def _taken(self, mine: list[int], whole: list[int], epoch: int, position: int) -> list[dict[str, Any]]:
        """Rows of a step, each with the one that it is mixed with, if any, from the whole of it."""
        rows = self.encoded.take(mine)
        partners = self.task.partners(whole, (self.seed, epoch, position))
        if partners is None:
            return rows
        of = dict(zip(whole, partners, strict=True))
        others = self.encoded.take([of[place] for place in mine])
        return [
            {**row, "place": place, "partner": {**other, "place": of[place]}, "step": position}
            for place, row, other in zip(mine, rows, others, strict=True)
        ]

    def probe(self, position: int) -> Iterator[Batch]:
        """A row or two of a batch, the same in every process, to try the model on."""
        yield self.one(self.encoded.take(self.sampler.batch(0, position)[:1]))

    def whole(self, position: int) -> list[Batch]:
        """A batch of the first epoch, the same in every process, cut into micro-batches."""
        return self.cut(self.encoded.take(self.sampler.batch(0, position)))


class AheadFeed(Feed):
    """The same batches, made in threads before they are asked for, so that a step does not wait for pictures.

    Args:
        workers: Threads, and batches that are made in advance.
    """

    def __init__(self, *of_feed: Any, workers: int):
        super().__init__(*of_feed)
        self.workers = workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="pictures")
        self._made: OrderedDict[tuple[int, int], Future[list[Batch]]] = OrderedDict()

    def use(self, encoded: Encoded) -> None:
        """As `Feed.use`."""
        super().use(encoded)
        while self._made:
            self._made.popitem()[1].cancel()

    def micro_batches(self, epoch: int, position: int) -> list[Batch]:
        """As `Feed.micro_batches`."""
        place = (epoch, position)
        for old in [known for known in self._made if known < place]:
            self._made.pop(old).cancel()
        wanted = place
        for _ in range(self.workers + 1):
            if wanted not in self._made:
                self._made[wanted] = self._pool.submit(super().micro_batches, *wanted)
            wanted = (wanted[0], wanted[1] + 1) if wanted[1] + 1 < self.steps_per_epoch else (wanted[0] + 1, 0)
        return self._made.pop(place).result()


class StreamFeed(_Micro):
    """Micro-batches of this process from rows that are read and encoded while training.

    The run is one long epoch. Places must be asked for in rising order; the first may be anywhere.
    """

    def __init__(
        self, stream: Stream, task: Task, tokenizer: Any, config: RunConfig, pad_id: int, rank: int, world: int
    ):
        super().__init__(task, tokenizer, config)
        self.stream, self.pad_id, self.rank, self.world = stream, pad_id, rank, world
        self.size = config.training.batch_size
        self.steps_per_epoch = config.training.max_steps or 1
        self._next = -1
        self._rows: Iterator[list[dict[str, Any]]] = iter(())

    def micro_batches(self, epoch: int, position: int) -> list[Batch]:
        """As `Feed.micro_batches`."""
        if position != self._next:
            self._rows = self.stream.batches(self.size, self.seed, start=position)
        self._next = position + 1
        whole = next(self._rows)  # each process reads them all, so that the batch is the same with any number of them
        mine = whole[self.rank :: self.world]
        batches = self.cut(self._encoded(mine or whole[:1]))
        return batches if mine else nothing_to_learn(batches)

    def probe(self, position: int) -> Iterator[Batch]:
        """As `Feed.probe`."""
        yield self.one(self._encoded(self.stream.head(position + 1)[-1:]))

    def whole(self, position: int) -> list[Batch]:
        """As `Feed.whole`."""
        rows = self.stream.head((position + 1) * self.size)[position * self.size :]
        return self.cut(self._encoded(rows))

    def _encoded(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found = [self.task.encode(row, self.tokenizer) for row in rows]
        return [row for row in found if row["input_ids"]] or [{"input_ids": [self.pad_id], "labels": [IGNORE]}]


AnyFeed = Feed | StreamFeed
