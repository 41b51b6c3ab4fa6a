"""From a frozen config to everything the loop works with: processes, rows, model, adapter."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn

from peftcli.artifacts import environment, lineage
from peftcli.config.errors import UserError
from peftcli.config.schema import LaunchConfig, RunConfig
from peftcli.data import checking, sources
from peftcli.data.origins import SPLITS
from peftcli.data.sampler import BatchSampler
from peftcli.data.sources import Splits
from peftcli.data.stream import Stream
from peftcli.methods import registry as methods
from peftcli.methods.contract import Calibration, Loss, Method
from peftcli.models import byte_tokenizer, loading, precision
from peftcli.models.loading import LoadedModel
from peftcli.tasks import registry as tasks
from peftcli.tasks.contract import Encoded, Task
from peftcli.tasks.tokens import pad_id
from peftcli.training import checks, seeds, sharding
from peftcli.training.feed import AheadFeed, AnyFeed, Feed, StreamFeed
from peftcli.training.found import FoundFolder
from peftcli.training.sharding import sharded

FOUND = "start"
"""Folder in the run folder for what a method finds before the first step."""
PROBES = 64
"""Rows that are tried at most until each trained tensor has had a gradient; the first does for nearly all methods."""


def threads(config: LaunchConfig) -> int:
    """CPU threads of a process: its share of all cores, or what the recipe says."""
    return config.threads or max(1, environment.cores() // config.processes)


def use_cores(config: LaunchConfig) -> None:
    """Give this process its share of the CPU, whatever the environment says."""
    torch.set_num_threads(threads(config))


def build_accelerator(config: RunConfig, folder: Path | None = None) -> Accelerator:
    """The process group and the arithmetic.

    Args:
        config: The run's.
        folder: Where trackers that write files put them.

    Raises:
        UserError: The recipe asks for hardware that is not here.
    """
    launch = config.launch
    if launch.device == "cuda" and not torch.cuda.is_available():
        raise UserError("launch.device=cuda, but PyTorch sees no GPU here; launch.device=cpu runs everywhere")
    on_cpu = launch.device == "cpu" or (launch.device == "auto" and not _accelerator_kind())
    chosen = precision.choose(config.training.precision, "cpu" if on_cpu else _accelerator_kind())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*log_with=")  # `trackers.start` says it in the user's words
        accelerator = Accelerator(
            cpu=on_cpu,
            project_dir=folder,
            # Only for fp16's loss scale. Its wrapper would keep a second, fp32 copy of the logits; see `arithmetic`.
            mixed_precision="fp16" if chosen == "fp16" else "no",
            log_with=None if config.tracker.name == "none" else config.tracker.name,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(minutes=launch.timeout_minutes)),
                # Else every forward pass would send masks, first factors and bases, which are the same everywhere.
                DistributedDataParallelKwargs(broadcast_buffers=config.model.batch_norm == "trained"),
            ],
        )
    if accelerator.num_processes != launch.world:
        raise UserError(f"{launch.world} processes were asked for, Accelerate runs {accelerator.num_processes}")
    if config.deterministic and accelerator.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return accelerator


def arithmetic(config: RunConfig, accelerator: Accelerator) -> str:
    """The precision of the forward pass on this process's device."""
    return precision.choose(config.training.precision, accelerator.device)


def _accelerator_kind() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else ""


@dataclass
class Material:
    """The rows of a run, as they are and as the model sees them, without those that it cannot see."""

    task: Task
    splits: Splits
    tokenizer: Any
    train: Encoded | Stream
    validation: Encoded | None
    test: Encoded | None

    @property
    def held_out(self) -> tuple[str, Encoded | None]:
        """The split that quality is reported on: test, or validation where there is no test split."""
        return ("test", self.test) if self.test is not None else ("validation", self.validation)

    def counts(self) -> dict[str, Any]:
        """Rows, tokens, truncations of each split."""
        found = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: part.counts for name, part in found.items() if isinstance(part, Encoded)}


def load_material(config: RunConfig) -> Material:
    """Read, check and encode the rows."""
    task = tasks.build(config.task, config.seed)
    splits = sources.load(config.data, task.needed)
    splits.notes.extend(task.notes)
    task.fit(splits)
    words = task.reader(config.model)
    if words is None:
        raise UserError(
            f"{config.model.name} has no tokenizer on this machine, so its rows cannot be encoded; peft train "
            "--dry-run and peft estimate work without one"
        )
    if words.name_or_path == byte_tokenizer.NAME and task.architecture != "image-classification":
        splits.notes.append(
            "random weights read the rows byte by byte: rows are longer than with the model's own words"
        )
    encoded: dict[str, Any] = {
        name: rows if rows is None or isinstance(rows, Stream) else task.encode_split(rows, words)
        for name in SPLITS
        for rows in [getattr(splits, name)]
    }
    _settle(config, encoded, splits.notes)
    left = {
        name: getattr(splits, name).select(part.kept)
        for name, part in encoded.items()
        if isinstance(part, Encoded) and part.kept is not None
    }
    return Material(task, replace(splits, **left), words, encoded["train"], encoded["validation"], encoded["test"])


def _settle(config: RunConfig, encoded: dict[str, Any], notes: list[str]) -> None:
    """Rows that turned out to be of no use when they were encoded stop the run, or are noted, as the recipe says.

    Raises:
        UserError: There are some, and `data.bad_rows` is error; or a split has no others.
    """
    found = [(name, part) for name, part in encoded.items() if isinstance(part, Encoded)]
    mistakes = []
    for name, part in found:
        total = part.counts["rows"] + part.counts["dropped"]
        mistake, note = checking.settled(name, part.bad, total, config.data.bad_rows)
        mistakes += [mistake] if mistake else []
        notes += [note] if note else []
    if mistakes:
        raise UserError(*mistakes)


def build_feed(config: RunConfig, material: Material, accelerator: Accelerator) -> tuple[AnyFeed, int]:
    """The batches of this process, and the number of optimiser steps of the run."""
    settings, place = config.training, (accelerator.process_index, accelerator.num_processes)
    task, words = material.task, material.tokenizer
    if isinstance(material.train, Stream):
        assert settings.max_steps is not None
        return StreamFeed(material.train, task, words, config, pad_id(words), *place), settings.max_steps
    sampler = BatchSampler(
        material.train.lengths, settings.batch_size, settings.batch_tokens, settings.group_by_length,
        seeds.derive(config.seed, "order"), task.classes(material.train),
    )  # fmt: skip
    steps = sampler.total_steps(settings.epochs) if settings.max_steps is None else settings.max_steps
    whole = (material.train, sampler, task, words, config, *place)
    return AheadFeed(*whole, workers=task.workers) if task.workers else Feed(*whole), steps


@dataclass
class Attached:
    """The base with the adapter in it, and what the checks found."""

    loaded: LoadedModel
    model: Any
    """A PEFT model, or the Transformers model itself where the method is no adapter."""
    method: Method
    probe: dict[str, torch.Tensor]
    before: torch.Tensor
    """The untouched base's outputs on the probe batch."""
    base: dict[str, str] | None = None
    """Digests of the base's tensors, where they cannot be read off the model later."""
    checks: list[dict[str, Any]] = field(default_factory=list)


def place(config: RunConfig, accelerator: Accelerator) -> torch.device:
    """Where the whole model is before the first step: a model that is to be cut up may be too large for one device."""
    return torch.device("cpu") if sharded(config) else accelerator.device


def load_model(config: RunConfig, material: Material, accelerator: Accelerator) -> LoadedModel:
    """The untouched base, whole; a new head is drawn from the run's seed."""
    seeds.start(config.seed, "init", "head")
    return loading.load(
        config.model,
        arithmetic(config, accelerator),
        material.task.architecture,
        material.task.labels,
        device=str(place(config, accelerator)),
        image_size=material.task.image_size,
        several_labels=material.task.several_labels,
    )


def attach(
    config: RunConfig, loaded: LoadedModel, material: Material, feed: AnyFeed, steps: int, accelerator: Accelerator
) -> Attached:
    """Put the adapter in and check that it starts as the base, learns everywhere and can be switched off.

    Args:
        config: The run's.
        loaded: The untouched base.
        material: The rows.
        feed: The training batches.
        steps: Optimiser steps of the run.
        accelerator: The process group.
    """
    device = place(config, accelerator)
    batches = (
        {k: v.to(device) for k, v in batch.items()}
        for position in range(min(PROBES, feed.steps_per_epoch))
        for batch in feed.probe(position)
    )
    probe = next(batches)
    method = methods.find(config.method.name)(config.method)
    if sharded(config):
        sharding.check(method, config.method.name)
    if config.training.gradient_checkpointing and not method.capabilities.recomputes:
        raise UserError(
            f"method={config.method.name} does not work with training.gradient_checkpointing: what it puts before the "
            "row is lost when activations are computed again"
        )
    if config.training.gradient_checkpointing and not loaded.model.supports_gradient_checkpointing:
        raise UserError(f"{loaded.model.config.model_type} does not work with training.gradient_checkpointing")
    stays = method.saves == "adapter" and method.capabilities.unloads and not sharded(config)
    base = None if stays else lineage.digests(loaded.model)
    chosen = precision.choose(config.training.precision, accelerator.device)
    loss = _mean_loss(material.task, chosen, device)
    found = FoundFolder(Path(accelerator.project_dir) / FOUND) if accelerator.project_dir else None
    calibration = Calibration(_Batches(feed, device), loss, feed.steps_per_epoch, steps, found)
    with precision.autocast(chosen, device):
        before = checks.outputs(loaded.model, probe)
        seeds.start(config.seed, "init", "adapter")
        with accelerator.main_process_first() if method.saves == "model" else nullcontext():
            model = method.attach(loaded.model, loaded.family, calibration).to(device)
        attached = Attached(loaded, model, method, probe, before, base)
        if method.capabilities.identity_at_start:
            share = checks.identity_start(before, checks.outputs(model, probe), chosen)
            detail = f"mean difference from the base {share:.2g} of the spread"
            attached.checks.append(_passed("identity-start", detail))
    if config.training.gradient_checkpointing:
        loaded.model.activation_checkpointing_enable({"use_reentrant": False})
        # Transformers makes the embeddings' output need a gradient, for the reentrant kind; it would keep a graph of
        # every block, and compute it again, before the first one that is trained.
        loaded.model.disable_input_require_grads()
    for stage in method.stages(steps)[:1]:
        if stage.start:
            stage.start(model)
    if not method.capabilities.trains or not steps:
        return attached
    tensors, used = checks.dead_adapter(model, partial(loss, model), chain([probe], batches), config.seed)
    attached.checks.append(
        _passed("dead-adapter", f"all {tensors} trained tensors get a gradient ({used} probe batches)")
    )
    return attached


@dataclass(frozen=True)
class _Batches:
    """The training batches of the first epoch as micro-batches, from the start at each iteration."""

    feed: AnyFeed
    device: torch.device

    def __iter__(self) -> Iterator[list[dict[str, torch.Tensor]]]:
        for position in range(self.feed.steps_per_epoch):
            yield [{k: v.to(self.device) for k, v in batch.items()} for batch in self.feed.whole(position)]


def _mean_loss(task: Task, chosen: str, device: torch.device) -> Loss:
    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with precision.autocast(chosen, device):
            found = task.loss(model, batch)
            return found.total / max(found.weight, 1)

    return loss


def _passed(name: str, detail: str) -> dict[str, Any]:
    return {"name": name, "passed": True, "detail": detail}
