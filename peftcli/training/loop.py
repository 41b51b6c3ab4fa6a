"""The loop: stages of optimiser steps on Accelerate, measured, checkpointed, exactly resumable.

A step takes one global batch, whatever the number of processes: each process gets its share of the rows, cuts it
into micro-batches and adds up gradients of `sum of losses / supervised positions of the whole batch`. So neither
processes nor micro-batches nor unequal lengths change what is computed, up to the order of additions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from peftcli.artifacts.run_folder import RunFolder
from peftcli.config.schema import RunConfig
from peftcli.methods.contract import Method, Stage
from peftcli.models import batch_norm, precision
from peftcli.tasks.contract import Task
from peftcli.training import checkpoints, checks, feed, memory, optimiser, seeds, sharding
from peftcli.training.casting import left_to_autocast
from peftcli.training.checkpoints import Checkpoint, Progress
from peftcli.training.display import Display
from peftcli.training.feed import AnyFeed, rows_of, tokens_of
from peftcli.training.prefix import Prefix
from peftcli.training.preflight import Places, agree
from peftcli.training.signals import Stopped, StopRequest

SAVES = 10
"""Checkpoints of a run at least, where `training.save_every` does not say."""


@dataclass
class Job:
    """Everything that the loop works with."""

    config: RunConfig
    model: nn.Module
    method: Method
    task: Task
    feed: AnyFeed
    steps: int
    accelerator: Accelerator
    run: RunFolder
    display: Display
    stop: StopRequest
    measure: Callable[[nn.Module], dict[str, float]] | None = None
    """Metrics of the validation split; None where there is none."""
    track: Callable[[dict[str, Any]], None] = lambda row: None
    """Takes the rows of metrics.jsonl elsewhere too."""
    step_seconds: list[float] = field(default_factory=list)
    first_step_at: float = 0.0
    """`time.time()` at the end of this process's first step."""
    notes_said: int = 0
    prefix: Prefix = field(default_factory=Prefix)
    places: Places = field(default_factory=lambda: Places(0, 1))
    sharded: bool = False
    """The model is cut up among the processes, which do everything together, up to the end."""

    def __post_init__(self) -> None:
        self.precision = precision.choose(self.config.training.precision, self.accelerator.device)

    def arithmetic(self) -> AbstractContextManager:
        """The context of a forward pass."""
        return precision.autocast(self.precision, self.accelerator.device)

    def heed_stop(self) -> None:
        """Stop between two parts of what follows the last step.

        Raises:
            Stopped: A signal asked for it.
        """
        asked = bool(self.stop.name)
        if self.sharded:
            asked = any(gather_object([asked]))
        if asked:
            raise Stopped

    def say_notes(self) -> None:
        """Show what the method decided since this was last called."""
        for note in self.method.notes[self.notes_said :]:
            self.display.say(f"{self.config.method.name}: {note}")
        self.notes_said = len(self.method.notes)

    def log(self, row: dict[str, Any]) -> None:
        """A row for metrics.jsonl and the tracker, from the first process."""
        if self.accelerator.is_main_process:
            self.run.log(row)
            self.track(row)


def train(job: Job, resumed: Checkpoint | None = None, stages: list[Stage] | None = None) -> tuple[Progress, set[str]]:
    """Train through all stages and leave the model with the weights to keep.

    Args:
        job: The run.
        resumed: The checkpoint to go on from.
        stages: In place of the method's own.

    Returns:
        Where the loop ended, and the names of all tensors that a stage trained.

    Raises:
        Stopped: A signal asked for it; a checkpoint is on disk.
        CheckFailed: A named check stopped the run.
    """
    progress = resumed.progress if resumed else Progress()
    touched = set(resumed.trained) if resumed else set()
    stages = stages or job.method.stages(job.steps)
    with left_to_autocast(job.model, job.precision != "fp32"):
        _through(job, stages, progress, touched, resumed)
    _keep_best(job, progress)
    return progress, touched


def _through(job: Job, stages: list[Stage], progress: Progress, touched: set[str], resumed: Checkpoint | None) -> None:
    """Take the stages that are left, in turn. The best measurement is that of the last stage, and patience starts anew
    with each: what an earlier stage trained is not what the run is for."""
    for index in range(progress.stage, len(stages)):
        if index > progress.stage:
            progress.stage, progress.stage_step = index, 0
            progress.best, progress.best_step, progress.without_better = None, None, 0
            progress.stopped_early = False
        StageLoop(job, stages[index], progress, touched, resumed).run()
        resumed = None


def _keep_best(job: Job, progress: Progress) -> None:
    """Load the best measured checkpoint, on the CPU and in place, where it is not the last step."""
    if job.config.training.keep_best and progress.best_step not in (None, progress.step):
        folder = checkpoints.folder_of(job.run.checkpoints, progress.best_step)
        if not folder.is_dir():
            job.display.say(f"the best measured checkpoint, {folder}, is gone: the last step is kept")
            return
        best = checkpoints.load(folder)
        job.method.restore(job.model, best.method)
        checkpoints.restore(job.model, best.trained)
        job.display.say(f"kept the best measured checkpoint, step {progress.best_step} of {progress.step}")


class StageLoop:
    """One stage: its trained tensors, its optimiser, its schedule."""

    def __init__(self, job: Job, stage: Stage, progress: Progress, touched: set[str], resumed: Checkpoint | None):
        self.job, self.stage, self.progress, self.touched = job, stage, progress, touched
        self.settings = job.config.training
        seeds.start(job.config.seed, "stage", progress.stage)
        self._start()
        job.say_notes()
        if resumed:
            job.method.restore(job.model, resumed.method)
            checkpoints.restore(job.model, resumed.trained)
        job.accelerator.free_memory()  # forgets the former stage's optimiser, whose gradients it would unscale too
        self.names = {p: n for n, p in job.model.named_parameters() if p.requires_grad}
        touched.update(self.names.values(), batch_norm.statistics(job.model))
        built = optimiser.build(job.config.optim, job.model, job.method.parameter_groups(job.model))
        if job.method.capabilities.wrapped and not job.sharded:
            self.model, self.optimiser = job.accelerator.prepare(job.model, built)
        else:
            self.model, self.optimiser = job.model, job.accelerator.prepare(built)
        if resumed and progress.stage_step:
            optimiser.load_state(built, self.names, resumed.optimiser)
            if job.accelerator.scaler is not None and resumed.scaler:
                job.accelerator.scaler.load_state_dict(resumed.scaler)
        job.method.take_optimiser(job.model, built)

    def _start(self) -> None:
        """What the stage trains; a choice by the base's values needs them whole."""
        if self.stage.start is None:
            return
        reads = self.job.sharded and self.job.method.saves == "adapter"
        with sharding.gathered(self.job.model) if reads else nullcontext():
            self.stage.start(self.job.model)

    def run(self) -> None:
        """Take steps up to the stage's end, an early stop or a request to stop."""
        self.job.model.train()
        with self.job.prefix.within(self.job, self.stage, self.progress):
            self._run()

    def _run(self) -> None:
        job, progress = self.job, self.progress
        while progress.stage_step < self.stage.steps and not progress.stopped_early:
            asked = self.advance()
            last = progress.stage_step == self.stage.steps
            measured = self.stage.measured and job.measure is not None and self._measure_due(last)
            if measured:
                self._measure()
            if asked or last or progress.stopped_early or self._save_due(measured):
                self._save()
            if asked:
                raise Stopped

    def advance(self) -> bool:
        """One optimiser step, logged and shown; returns whether any process was asked to stop."""
        row, asked = self._step()
        if self.progress.step % self.settings.log_every == 0:
            self.job.log(row)
        self.job.display.step(row)
        return asked

    def _step(self) -> tuple[dict[str, Any], bool]:
        """One optimiser step; returns its log row and whether any process was asked to stop."""
        job, progress, began = self.job, self.progress, time.perf_counter()
        job.places.at(f"step {progress.step + 1}", often=True)
        accelerator, optim = job.accelerator, self.job.config.optim
        seeds.start(job.config.seed, "dropout", progress.step, accelerator.process_index)
        lr = optimiser.set_rate(self.optimiser, optim, progress.stage_step, self.stage.steps)
        batches = job.feed.micro_batches(progress.epoch, progress.position)
        batches = feed.as_many(batches, int(self._most(len(batches)))) if job.sharded else batches
        waited = time.perf_counter() - began
        mine = sum(job.task.weight(batch) for batch in batches)
        weight = self._sum(mine)[0]
        total = 0.0
        for index, batch in enumerate(batches):
            batch = {k: v.to(accelerator.device, non_blocking=True) for k, v in batch.items()}
            last = index == len(batches) - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                with job.arithmetic():
                    loss = job.method.batch_loss(job.model, batch, job.task.loss(self.model, batch).total)
                scaled = loss * (accelerator.num_processes / max(weight, 1.0))
                accelerator.backward(scaled + self._penalty() if last else scaled)
            total += loss.item()
        self._average()
        norm = self._clip(optim.clip_norm)
        tokens = sum(map(tokens_of, batches)) if mine else 0
        rows = sum(map(rows_of, batches)) if mine else 0
        total, asked, all_tokens, all_rows = self._sum(total, float(bool(job.stop.name)), tokens, rows)
        # Under a loss scale an overflow is skipped and the scale falls; it ends at a gradient of zero if it must.
        checks.finite(total, norm if accelerator.scaler is None else 0.0, progress.step + 1)
        if weight:
            progress.zero_gradients = checks.zero_gradient(norm, progress.zero_gradients, progress.step + 1)
        self.optimiser.step()
        job.method.after_step(job.model, progress.step + 1)
        self.optimiser.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - began
        self._advance(int(all_tokens), int(all_rows), seconds)
        return {
            **self._place(),
            **job.method.log(job.model),
            "loss": total / max(weight, 1.0),
            "grad_norm": norm,
            "lr": lr,
            "tokens": int(all_tokens),
            "rows": int(all_rows),
            "seconds": round(seconds, 4),
            "waited": round(waited, 4),
            "memory_bytes": memory.held(accelerator.device),
        }, bool(asked)

    def _penalty(self) -> torch.Tensor | float:
        penalty = self.job.method.penalty(self.job.model)
        return 0.0 if penalty is None else penalty

    def _agreed(self, metrics: dict[str, float]) -> dict[str, float]:
        """The first process's numbers, so that all stop at the same step."""
        return broadcast_object_list([metrics])[0] if self.job.accelerator.num_processes > 1 else metrics

    def _place(self) -> dict[str, Any]:
        epoch = self.progress.epoch + self.progress.position / self.job.feed.steps_per_epoch
        return {"step": self.progress.step, "epoch": round(epoch, 4), "stage": self.stage.name}

    def _average(self) -> None:
        """The mean of each gradient over the processes, where nothing around the model has done it."""
        if self.job.accelerator.num_processes == 1 or self.model is not self.job.model:
            return
        sharding.average([parameter for parameter in self.names if not sharding.is_part(parameter)])

    def _clip(self, usual: float | None) -> float:
        """Clip the gradients, and return the norm that all of them had together."""
        parts = optimiser.clips(self.optimiser, self.names, usual)
        if len(parts) == 1 and (limit := parts[0][1]) is not None and not self.job.sharded:
            return float(self.job.accelerator.clip_grad_norm_(parts[0][0], limit))
        self.job.accelerator.unscale_gradients(self.optimiser)
        norms = []
        for parameters, limit in parts:
            gradients = [p.grad for p in parameters if p.grad is not None]
            norms.append(sharding.whole(nn.utils.get_total_norm(gradients)))
            if limit is not None:
                nn.utils.clip_grads_with_norm_(parameters, limit, norms[-1])
        return float(norms[0] if len(norms) == 1 else torch.stack(norms).norm())

    def _most(self, value: float) -> float:
        """The largest over all processes."""
        return max(gather_object([value]))

    def _sum(self, *values: float) -> list[float]:
        """Sums over all processes."""
        if self.job.accelerator.num_processes == 1:
            return list(values)
        device = self.job.accelerator.device
        kind = torch.float32 if device.type == "mps" else torch.float64
        return self.job.accelerator.reduce(torch.tensor(values, dtype=kind, device=device), "sum").tolist()

    def _advance(self, tokens: int, rows: int, seconds: float) -> None:
        progress = self.progress
        progress.step += 1
        progress.stage_step += 1
        progress.position += 1
        progress.tokens += tokens
        progress.rows += rows
        progress.train_seconds += seconds
        self.job.step_seconds.append(seconds)
        self.job.first_step_at = self.job.first_step_at or time.time()
        if progress.position == self.job.feed.steps_per_epoch:
            progress.epoch, progress.position = progress.epoch + 1, 0

    def _due(self, every: int | str, last: bool) -> bool:
        if last or every == "end":
            return last
        return self.progress.position == 0 if every == "epoch" else self.progress.step % int(every) == 0

    def _measure_due(self, last: bool) -> bool:
        every = self.stage.every
        return self._due(self.settings.eval_every, last) or bool(every and self.progress.stage_step % every == 0)

    def _save_due(self, measured: bool) -> bool:
        every = self.settings.save_every
        if every is None:
            return measured or self.progress.step % max(1, math.ceil(self.job.steps / SAVES)) == 0
        return self.progress.step % every == 0 or (measured and self._is_best())

    def _is_best(self) -> bool:
        return self.progress.best_step == self.progress.step

    def _measure(self) -> None:
        """Measure the validation split; note the best, and whether to stop early."""
        job, progress = self.job, self.progress
        assert job.measure is not None
        job.places.at(f"measuring after step {progress.step}")
        metrics = self._agreed(job.measure(job.model))
        job.model.train()
        value = metrics[job.task.best_metric]
        better = progress.best is None or (
            value > progress.best if job.task.higher_is_better else value < progress.best
        )
        if better:
            progress.best, progress.best_step, progress.without_better = value, progress.step, 0
        else:
            progress.without_better += 1
        patience = self.settings.early_stopping if self.stage.stops_early else None
        progress.stopped_early = patience is not None and progress.without_better >= patience
        job.log({**self._place(), "validation": metrics})
        shown = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items())
        job.display.say(f"step {progress.step}: validation {shown}" + (", the best so far" if better else ""))
        if progress.stopped_early:
            job.display.say(f"stopped early: {patience} measurements without a better {job.task.best_metric}")
        rows = len(getattr(job.measure, "encoded", ()))
        job.method.measured(job.model, value, job.task.higher_is_better, rows)
        job.say_notes()

    def _save(self) -> None:
        """Write a checkpoint; processes wait for one another, since the next step would anyway."""
        job = self.job
        main, scaler = job.accelerator.is_main_process, job.accelerator.scaler
        job.places.at(f"a checkpoint after step {self.progress.step}")
        mine = {name: parameter for parameter, name in self.names.items() if not sharding.is_part(parameter)}
        agree(job.places, "trained tensors", checks.combined({n: checks.checksum(p.detach()) for n, p in mine.items()}))
        if main or job.sharded:
            checkpoint = Checkpoint(
                Progress(**asdict(self.progress)),
                checkpoints.trained_tensors(job.model, self.touched),
                optimiser.state_tensors(self.optimiser, self.names),
                {n: t.detach().to("cpu", copy=True) for n, t in job.method.state(job.model).items()},
                scaler.state_dict() if scaler is not None else None,
            )
        if main:
            checkpoints.save(job.run.checkpoints, checkpoint)
            checkpoints.prune(job.run.checkpoints, self.settings.keep_checkpoints, self.progress.best_step)
        job.accelerator.wait_for_everyone()
