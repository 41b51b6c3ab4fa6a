"""What a process holds at once: rows, their length, the positions that are learnt; from the rows, or assumed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftcli.config import paths
from peftcli.config.errors import UserError
from peftcli.config.schema import EpisodesConfig, GenerationConfig, ImageConfig, RunConfig
from peftcli.data.collate import IGNORE, MULTIPLE
from peftcli.data.sampler import BatchSampler
from peftcli.data.stream import Stream
from peftcli.models import loading
from peftcli.tasks import registry as tasks
from peftcli.tasks.contract import Encoded, Sizes, Task
from peftcli.tasks.episodes.pool import Pool
from peftcli.training import prepare, seeds

DRAWN = 2000
"""Few-shot tasks that are drawn to see how large they are."""
ASSUMED_LABELS = 2
ASSUMED_PIXELS = 224
"""Side of a picture where the model's own reader is not here."""


@dataclass(frozen=True)
class Shape:
    """A micro-batch."""

    rows: int
    length: int
    """Tokens of its longest row, to which the others are padded; the side of pictures in pixels."""
    learnt: int
    """Supervised positions of all rows."""
    parts: tuple[Sizes, ...] = ()
    """Few-shot tasks that the rows are of."""


@dataclass
class Workload:
    """The micro-batches of a run.

    Attributes:
        task: The task, fitted where the rows are here.
        heaviest: The largest micro-batch of training.
        mean: A micro-batch of rows of mean length, or of few-shot tasks of middle size; None where the rows are not
            here.
        measured: The largest batch of a measurement; None where nothing is measured.
        accumulates: Several micro-batches add up to an optimiser step.
        steps: Optimiser steps of the run; None where the rows are not here.
        notes: What was assumed.
    """

    task: Task
    heaviest: Shape
    mean: Shape | None
    measured: Shape | None
    accumulates: bool
    steps: int | None
    notes: list[str] = field(default_factory=list)


def find(config: RunConfig) -> Workload:
    """Look at the rows where they are on this machine, and assume the longest ones elsewhere. Asks no network.

    Raises:
        UserError, CheckFailed: The rows are here and wrong.
    """
    if reason := _absent(config):
        return _assumed(config, reason)
    material = prepare.load_material(config)
    if isinstance(material.train, Pool):
        return _few_shot(config, material, material.train)
    if isinstance(config.task, ImageConfig):
        return _pictures(config, material)
    if isinstance(material.train, Stream):
        return _assumed(config, "the rows are a stream", material.task)
    return _seen(config, material.train, material.task, material.validation or material.test)


def _absent(config: RunConfig) -> str:
    """Why the rows or the tokenizer cannot be read here, or nothing."""
    drawn = config.model if config.model.weights == "random" and config.model.shape else None
    domains = config.data.domains.values()
    parts: list[tuple[Any, str]] = [(config.data, "data"), *((one, "data") for one in domains), (config.model, "model")]
    for part, group in parts:
        if part.source == "hub" and part is not drawn:
            return f"{part.name} is on the hub, which is not asked"
        if part.source == "sample" and not _fetched(str(part.name)):
            return f"sample {part.name} ({group}) is not fetched"
    if isinstance(config.task, ImageConfig) or getattr(config.task, "reads", "") == "pictures":
        return ""
    if drawn is not None and drawn.source != "folder" and loading.tokenizer(drawn) is None:
        return "a model of random weights and so small a vocabulary has no tokenizer"
    if config.model.source == "folder" and not any(Path(config.model.name).expanduser().glob("tokenizer*")):
        return f"{config.model.name} has no tokenizer"
    return ""


def _fetched(name: str) -> bool:
    try:
        paths.sample_folder(name)
    except UserError:
        return False
    return True


def _assumed(config: RunConfig, reason: str, task: Task | None = None) -> Workload:
    if isinstance(config.task, ImageConfig):
        return _assumed_pictures(config, config.task, reason)
    if isinstance(config.task, EpisodesConfig):
        return _assumed_tasks(config, config.task, reason)
    settings, length = config.training, config.task.max_length
    notes = [f"{reason}: every row counts as task.max_length={length} tokens"]
    if task is None:
        task = tasks.build(config.task)
        if isinstance(config.task, GenerationConfig):
            notes.append("how much of a row is answer is unknown: all of it counts as learnt")
        else:
            task.labels = list(config.task.labels) or [str(i) for i in range(ASSUMED_LABELS)]
            notes.append(f"the labels are unknown: {len(task.labels)} are assumed, which costs next to nothing")
            vars(task)["words"] = list(range(len(task.labels)))
    rows = max(1, settings.batch_tokens // length) if settings.batch_tokens else settings.batch_size
    rows, accumulates = _share(config, rows)
    learnt = length - 1 if isinstance(config.task, GenerationConfig) else 1
    return Workload(
        task, Shape(rows, _padded(length), rows * learnt), None,
        Shape(settings.eval_batch_size, _padded(length), settings.eval_batch_size * learnt), accumulates,
        settings.max_steps, notes,
    )  # fmt: skip


def _assumed_pictures(config: RunConfig, asked: ImageConfig, reason: str) -> Workload:
    """All pictures are of one size, so only their number and their classes are unknown."""
    settings, task = config.training, tasks.build(asked)
    size = asked.image_size or config.model.shape.get("image_size") or ASSUMED_PIXELS
    task.labels = [str(i) for i in range(ASSUMED_LABELS)]
    notes = [f"{reason}: {ASSUMED_LABELS} classes are assumed, which costs next to nothing"]
    rows, accumulates = _share(config, settings.batch_size)
    measured = Shape(settings.eval_batch_size, size, settings.eval_batch_size)
    return Workload(task, Shape(rows, size, rows), None, measured, accumulates, settings.max_steps, notes)


def _pictures(config: RunConfig, material: prepare.Material) -> Workload:
    settings, size = config.training, material.tokenizer.size
    assert isinstance(material.train, Encoded)
    rows, accumulates = _share(config, min(settings.batch_size, len(material.train)))
    each = Shape(rows, size, rows)
    held_out = material.validation or material.test
    most = min(settings.eval_batch_size, len(held_out)) if held_out is not None else 0
    steps = settings.max_steps
    if steps is None:
        steps = max(1, math.ceil(settings.epochs * math.ceil(len(material.train) / settings.batch_size)))
    return Workload(material.task, each, each, Shape(most, size, most) if most else None, accumulates, steps)


def _few_shot(config: RunConfig, material: prepare.Material, pool: Pool) -> Workload:
    """Tasks are of many sizes: the largest that an epoch draws, and those in the middle."""
    settings = config.training
    drawn = [pool.task(number, (config.seed, 0))[1] for number in range(min(len(pool), DRAWN))]
    sizes = sorted(((len(one.support), len(one.query), one.ways) for one in drawn), key=lambda one: one[0] + one[1])
    count, accumulates = _share(config, min(settings.batch_size, len(pool)))
    lengths = pool.source.lengths
    longest = usual = getattr(material.tokenizer, "size", 0)
    if material.task.architecture != "image-classification":
        longest, usual = _padded(max(lengths)), _padded(round(sum(lengths) / len(lengths)))
    steps = settings.max_steps
    if steps is None:
        steps = max(1, math.ceil(settings.epochs * math.ceil(len(pool) / settings.batch_size)))
    notes = [f"{name}: {material.task.told(counts)}" for name, counts in material.counts().items()]
    middle = sizes[len(sizes) // 2]
    notes.append(
        f"support + query rows of a task: from {_words(sizes[0])} to {_words(sizes[-1])}; half of the tasks have "
        f"{middle[0] + middle[1]} rows or fewer"
    )
    task = tasks.build(config.task)  # without rows, whose features would be computed
    return Workload(
        task, _of_tasks(sizes[-count:], longest), _of_tasks([middle] * count, usual), None,
        accumulates, steps, notes + material.splits.notes,
    )  # fmt: skip


def _of_tasks(parts: Sequence[Sizes], length: int) -> Shape:
    rows, learnt = (sum(part[i] for part in parts) for i in (0, 1))
    return Shape(rows + learnt, length, learnt, tuple(parts))


def _assumed_tasks(config: RunConfig, asked: EpisodesConfig, reason: str) -> Workload:
    """The largest task that the recipe allows."""
    ways = asked.ways[1]
    largest = (asked.support, ways * asked.queries, ways)
    if asked.reads == "pictures":
        length = asked.image_size or config.model.shape.get("image_size") or ASSUMED_PIXELS
    else:
        length = _padded(asked.max_length)
    count, accumulates = _share(config, config.training.batch_size)
    notes = [f"{reason}: every task counts as the largest that task.* allows, {_words(largest)} (support + query)"]
    shape = _of_tasks([largest] * count, length)
    return Workload(tasks.build(asked), shape, None, None, accumulates, config.training.max_steps, notes)


def _words(part: Sizes) -> str:
    support, query, ways = part
    return f"{support} + {query} of {ways} classes"


def _share(config: RunConfig, rows: int) -> tuple[int, bool]:
    """Rows that one process holds at once out of a global batch, and whether there are several such parts."""
    mine = math.ceil(rows / config.launch.world)
    micro = min(config.training.micro_batch_size or mine, mine)
    return micro, micro < mine


def _seen(config: RunConfig, train: Encoded, task: Task, held_out: Encoded | None) -> Workload:
    settings, lengths = config.training, train.lengths
    sampler = BatchSampler(
        lengths, settings.batch_size, settings.batch_tokens, settings.group_by_length,
        seeds.derive(config.seed, "order"),
    )  # fmt: skip
    batches = [sampler.batch(0, position) for position in range(sampler.steps_per_epoch)]
    largest = max(batches, key=lambda rows: len(rows) * max(lengths[row] for row in rows))
    rows, accumulates = _share(config, len(largest))
    if settings.batch_tokens:
        heaviest = _of(train, sorted(largest, key=lambda row: -lengths[row])[:rows])
    else:
        heaviest = _of(train, train.by_length(rows)[0])
    usual, _ = _share(config, round(len(lengths) / len(batches)))
    learnt = train.counts["trained_tokens"] / len(train)
    mean = Shape(usual, _padded(round(sum(lengths) / len(lengths))), max(1, round(usual * learnt)))
    measured = _of(held_out, held_out.by_length(settings.eval_batch_size)[0]) if held_out is not None else None
    steps = sampler.total_steps(settings.epochs) if settings.max_steps is None else settings.max_steps
    return Workload(task, heaviest, mean, measured, accumulates, steps)


def _of(encoded: Encoded, rows: list[int]) -> Shape:
    """The micro-batch of these rows."""
    learnt = sum(label != IGNORE for row in encoded.take(rows) for label in row["labels"])
    return Shape(len(rows), _padded(max(encoded.lengths[row] for row in rows)), max(1, learnt))


def _padded(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE
