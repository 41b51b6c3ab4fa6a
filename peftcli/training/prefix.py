"""Frozen parts of a model of pictures are computed once: what they make of each row is kept and fed in their place.

Where a stage trains nothing before some block (or the head), and a picture gives the same input in every epoch, the
hidden state that enters there is the same in every epoch too. It is kept in the type it has, and the rows are always
computed in the same parts, in their own order, so that a resumed run has the same numbers. A row that is computed
beside other rows than in its batch can differ in the last bit where a kernel's order of additions depends on the batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from peftcli.data.ahead import ahead
from peftcli.methods.contract import Stage
from peftcli.models import prefix
from peftcli.models.family import Family
from peftcli.models.prefix import Cut, Nowhere
from peftcli.reports import units
from peftcli.tasks.images.gallery import Gallery
from peftcli.training import checks
from peftcli.training.checkpoints import Progress

if TYPE_CHECKING:
    from peftcli.training.loop import Job

FREE_SHARE = 0.25
"""Of the free memory: more than this is not kept, unless the recipe says so."""
TRIED = 4
"""Pictures on which the short way through the model is compared with the whole one."""


@dataclass
class Prefix:
    """What is kept from one stage to the next.

    Attributes:
        family: The model's; None keeps nothing.
        notes: What was kept, in sentences; the log also has why something was not.
    """

    family: Family | None = None
    notes: list[str] = field(default_factory=list)
    _kept: dict[str, Tensor] = field(default_factory=dict)
    _key: tuple[str, str] = ("", "")
    _said: str = ""

    @contextmanager
    def within(self, job: Job, stage: Stage, progress: Progress) -> Iterator[None]:
        """Within it the feed and the measurements give hidden states where that can be and pays, and the model takes
        them; afterwards all is as before."""
        users = _users(job, stage)
        cut = self._cut(job, stage, progress, users) if users else None
        progress.kept_prefix = cut is not None
        if cut is None:
            self._kept.clear()
            yield
            return
        rows = {name: user.encoded for name, user in users.items()}
        self._fill(job, stage, progress, cut, rows)
        try:
            for name, user in users.items():
                user.use(replace(rows[name], hidden=self._kept[name]))
            with prefix.entered(cut):
                yield
        finally:
            for name, user in users.items():
                user.use(rows[name])

    def _cut(self, job: Job, stage: Stage, progress: Progress, users: dict[str, Any]) -> Cut | None:
        """Where the model is to be entered in this stage; None where it is not."""
        asked = job.config.training.cache_features
        decided = progress.kept_prefix if progress.stage_step > 0 else None  # as before, or a resumed run would differ
        if self.family is None or asked is False or decided is False:
            return None
        if reason := _never(job):
            self._say(job, f"no cached prefix: {reason}")
            return None
        try:
            with job.arithmetic():
                cut = prefix.find(job.model, self.family, _pixels(job, users["train"].encoded, range(TRIED)))
            if asked == "auto" and decided is None:
                self._pays(job, stage, cut, users)
        except Nowhere as reason:
            self._say(job, f"{stage.name}: no cached prefix: {reason}")
            return None
        return cut

    def _pays(self, job: Job, stage: Stage, cut: Cut, users: dict[str, Any]) -> None:
        """Raises Nowhere where keeping costs more than it saves, or too much memory."""
        if self._key == _key(cut) and self._kept.keys() >= users.keys():
            return
        if stage.steps <= job.feed.steps_per_epoch:
            raise Nowhere(f"its {stage.steps} steps see no picture twice")
        needed = sum(len(user.encoded) for user in users.values()) * torch.Size(cut.shape).numel() * cut.dtype.itemsize
        free = psutil.virtual_memory().available
        if needed > FREE_SHARE * free:
            much = f"{units.size(needed)} would be more than a quarter of the free memory, {units.size(free)}"
            raise Nowhere(f"{much}; training.cache_features=true keeps it all the same")

    def _fill(self, job: Job, stage: Stage, progress: Progress, cut: Cut, rows: dict[str, Gallery]) -> None:
        """Compute what is not there yet."""
        began, key = time.perf_counter(), _key(cut)
        if key != self._key:
            self._kept.clear()
            self._key = key
        missing = [name for name in rows if name not in self._kept]
        for name in missing:
            self._kept[name] = _computed(job, cut, rows[name])
        seconds = time.perf_counter() - began
        progress.train_seconds += seconds
        held = units.size(sum(states.nbytes for states in self._kept.values()))
        count = sum(len(rows[name]) for name in missing)
        how = f"{count:,} pictures in {units.duration(seconds)}" if missing else "from the stage before"
        note = f"{stage.name}: cached prefix: {cut.before}, {held}, {how}"
        self.notes.append(note)
        self._say(job, note)

    def _say(self, job: Job, note: str) -> None:
        if note != self._said:
            job.display.say(note)
        self._said = note


def _users(job: Job, stage: Stage) -> dict[str, Any]:
    """Who reads rows of pictures in a stage, by split."""
    found = {"train": job.feed, "validation": job.measure if stage.measured else None}
    users = {name: user for name, user in found.items() if isinstance(getattr(user, "encoded", None), Gallery)}
    return users if "train" in users else {}


def _never(job: Job) -> str:
    """Why nothing can be kept in any stage of this run; empty where it can."""
    if not job.task.repeats:
        return "training pictures are changed at random (task.augment)"
    if job.accelerator.num_processes > 1:
        return "each process would keep all rows (launch.processes)"
    return ""


def _key(cut: Cut) -> tuple[str, str]:
    """What the kept states depend on beside the rows."""
    sums = {name: checks.checksum(tensor.detach()) for name, tensor in cut.tensors().items() if tensor.numel()}
    return cut.place, checks.combined(sums)


def _pixels(job: Job, encoded: Gallery, rows: range) -> Tensor:
    batch = job.task.collate(encoded.take(rows[: len(encoded)]), job.feed.tokenizer)
    return batch["pixel_values"].to(job.accelerator.device)


def _computed(job: Job, cut: Cut, encoded: Gallery) -> Tensor:
    """The hidden states of a split, [N, *], on the CPU."""
    size = job.config.training.micro_batch_size or job.config.training.batch_size
    parts = [range(at, min(at + size, len(encoded))) for at in range(0, len(encoded), size)]
    kept: Tensor | None = None
    made = ahead(lambda part: job.task.collate(encoded.take(part), job.feed.tokenizer), parts, job.task.workers)
    with job.arithmetic():
        for part, batch in zip(parts, made, strict=True):
            state = prefix.hidden(cut, batch["pixel_values"].to(job.accelerator.device))
            if kept is None:
                kept = torch.empty(len(encoded), *cut.shape, dtype=cut.dtype)
            kept[part.start : part.stop] = state.cpu()
    assert kept is not None
    return kept
