"""Three real steps on real rows, in a process of their own: what memory and time a run takes on this machine."""

from __future__ import annotations

import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from peftcli.config import frozen
from peftcli.config.errors import CheckFailed, Mistake, UserError
from peftcli.config.schema import RunConfig
from peftcli.training.feed import Batch, Feed

STEPS = 3


@dataclass(frozen=True)
class Measured:
    """What three steps took.

    Attributes:
        step_seconds: A step on usual rows.
        steps: Optimiser steps of the whole run.
        loaded_bytes: Held once the base was loaded.
        peak_bytes: The most held, in a step with the longest rows of the data.
    """

    step_seconds: float
    steps: int
    loaded_bytes: int
    peak_bytes: int

    @property
    def growth(self) -> int:
        """What training added to the loaded base."""
        return self.peak_bytes - self.loaded_bytes

    @property
    def hours(self) -> float:
        """All steps, without measurements between and after them."""
        return self.steps * self.step_seconds / 3600


class LongestFirst:
    """The longest rows in the first step, so that memory is measured; usual rows after it.

    Args:
        feed: The run's own batches.
        rows: Rows of an optimiser step.
    """

    def __init__(self, feed: Feed, rows: int):
        self.feed, self.rows = feed, rows
        self.steps_per_epoch = STEPS + 1

    def micro_batches(self, epoch: int, position: int) -> list[Batch]:
        """As `Feed.micro_batches`."""
        if position == 0:
            rows = self.feed.encoded.take(self.feed.encoded.by_length(self.rows)[0])
            return self.feed.cut(rows)
        return self.feed.micro_batches(0, (position - 1) % self.feed.steps_per_epoch)


def probe(config: RunConfig) -> Measured:
    """Train three steps in a new process and leave nothing behind.

    Raises:
        UserError: The model or the rows are not here, or there is something wrong with them.
        CheckFailed: A named check stopped the steps, or the process was killed for the memory it took.
    """
    if config.launch.world > 1:
        raise UserError("--probe measures one process; leave launch.processes at 1")
    if config.task.type == "episodes":
        what = "few-shot tasks are of many sizes, and three of them say little of the others"
        raise UserError(Mistake(what, "--probe", hint="a short run tells its time and memory: training.max_steps=20"))
    with tempfile.TemporaryDirectory() as folder:
        # Three steps need no other rows than these, and write their checkpoint where it is removed.
        frozen.save(replace(config, output=str(Path(folder) / "runs")), Path(folder) / "config.yaml")
        spawned = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawned) as pool:
            try:
                found = pool.submit(_in_child, folder).result()
            except BrokenProcessPool as error:
                what = "the process was killed in its first steps, most likely for the memory it took"
                raise CheckFailed("out-of-memory", what, "peft estimate without --probe says what is needed") from error
    if "check" in found:
        raise CheckFailed(**found)
    if "mistake" in found:
        raise UserError(found["mistake"])
    return Measured(**found)


def _in_child(folder: str) -> dict[str, Any]:
    """The measurement, or the failure, as plain data."""
    try:
        return vars(measure(frozen.load(Path(folder) / "config.yaml")))
    except CheckFailed as failure:
        return {"check": failure.check, "what": failure.what, "hint": failure.hint}
    except UserError as error:
        return {"mistake": str(error)}


def measure(config: RunConfig) -> Measured:
    """Three steps of the loop in this process, which should be a fresh one. Makes a run folder in `config.output`."""
    from peftcli.artifacts.run_folder import RunFolder
    from peftcli.data.stream import Stream
    from peftcli.methods.contract import Stage
    from peftcli.training import checks, loop, memory, prepare
    from peftcli.training.display import Display
    from peftcli.training.signals import StopRequest

    prepare.use_cores(config.launch)
    accelerator = prepare.build_accelerator(config)
    material = prepare.load_material(config)
    loaded = prepare.load_model(config, material, accelerator)
    checks.fingerprints(loaded.model)  # reads every weight: those of a mapped file are not in memory before
    held = memory.held(accelerator.device)
    feed, steps = prepare.build_feed(config, material, accelerator)
    attached = prepare.attach(config, loaded, material, feed, steps, accelerator)  # type: ignore[arg-type]
    rows = config.training.batch_size
    if config.training.batch_tokens and isinstance(feed, Feed):
        rows = max(1, config.training.batch_tokens // max(feed.encoded.lengths))
    run = RunFolder.create(config)
    job = loop.Job(
        config, attached.model, attached.method, material.task,
        feed if isinstance(material.train, Stream) else LongestFirst(feed, rows),  # type: ignore[arg-type]
        STEPS, accelerator, run, Display(run.log_file, STEPS, quiet=True), StopRequest(),
    )  # fmt: skip
    last = attached.method.stages(steps)[-1]
    loop.train(job, stages=[Stage(last.name, STEPS, last.start)])
    return Measured(mean(job.step_seconds[1:]), steps, held, memory.peak(accelerator.device))
