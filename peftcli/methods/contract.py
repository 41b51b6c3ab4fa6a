"""What an adapter method is to the rest of the house: what it can do, and when it is called."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn

from peftcli.models.family import Family


@dataclass(frozen=True)
class Capabilities:
    """What a method promises; the contract tests hold it to exactly these."""

    merges: bool = True
    """Merging into the base gives the same outputs, up to rounding."""
    unloads: bool = True
    """Unloading gives back the base bit for bit."""
    identity_at_start: bool = True
    """Before the first step the outputs are the base's."""
    several_adapters: bool = True
    """Two adapters can live on one base and be switched."""
    recomputes: bool = True
    """The forward pass can be computed again in the backward pass (gradient checkpointing)."""
    wrapped: bool = True
    """Its model's forward pass may be wrapped to average gradients over processes; where not, the loop averages them
    itself after each step's last backward pass."""
    trains: bool = True
    """It trains anything at all."""
    whole_base: str = ""
    """Why each process needs all of its base, so that FSDP may not cut it up, and what there is instead; empty where it
    may."""
    layers: frozenset[str] = frozenset({"linear"})
    """Kinds of layer it adapts: linear, conv2d, ssm."""


UNLEARNT = -100
"""Label of a position that is not learnt."""
Inputs = dict[str, torch.Tensor]
Loss = Callable[[nn.Module, Inputs], torch.Tensor]


def shared(batch: Sequence[Inputs]) -> Iterator[tuple[Inputs, float]]:
    """The micro-batches of a batch, each with its share of what the batch has to learn; 1 together."""
    learnt = [int((one["labels"] != UNLEARNT).sum()) for one in batch] if len(batch) > 1 else [1]
    for one, count in zip(batch, learnt, strict=True):
        yield one, count / max(sum(learnt), 1)


class Found(Protocol):
    """What a method has found before the first step, in the run folder, so that a resumed run has the same."""

    def read(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """What `write` was given; None where that was not yet."""

    def write(self, plain: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Keep what can be JSON, and tensors by name."""


@dataclass(frozen=True)
class Calibration:
    """Training rows that a method may look at before it trains; the same in every process.

    Attributes:
        batches: Training batches of the first epoch, anew at each iteration, each cut into micro-batches for memory
            and on the model's device.
        loss: The mean loss of a model on a micro-batch, a scalar.
        batches_per_epoch: How many batches the training rows make.
        total_steps: Optimiser steps of the run.
        found: Where what comes of looking at them can be kept; None where there is no run folder.
    """

    batches: Iterable[Sequence[Inputs]]
    loss: Loss
    batches_per_epoch: int
    total_steps: int
    found: Found | None = None


@dataclass(frozen=True)
class Stage:
    """A stretch of training with one set of trained tensors, one optimiser and one schedule.

    `start` is called on the model at the stage's first step, and alone again when a run resumes inside the stage.
    """

    name: str
    steps: int
    start: Callable[[nn.Module], None] | None = None
    measured: bool = True
    """Whether the validation split is measured in it; where not, nothing of it can be the best."""
    every: int | None = None
    """Measure also after each so many of its steps, whatever `training.eval_every` says."""
    stops_early: bool = True
    """Whether `training.early_stopping` may end it."""


@dataclass(frozen=True)
class Candidate:
    """Settings that may be chosen.

    Attributes:
        settings: An instance of the method's settings class.
        about: What makes it another one than the others, by name.
    """

    settings: Any
    about: dict[str, float]


@dataclass(frozen=True)
class Form:
    """A form of the finished model whose costs the report compares with the others'.

    Attributes:
        name: What the report calls it.
        modules: What stands in the place of the base model's modules of these names in this form; the others stay.
    """

    name: str
    modules: dict[str, nn.Module]


class Method(ABC):
    """A method's life around the loop. A subclass overrides `attach` and whatever else it needs.

    Args:
        settings: An instance of the method's settings class.
    """

    capabilities: Capabilities = Capabilities()
    saves: Literal["adapter", "model"] = "adapter"

    def __init__(self, settings: Any):
        self.settings = settings
        self.notes: list[str] = []
        """What the method decided by itself, in sentences; shown to the user as they come, and in the report."""

    def candidates(self) -> list[Candidate]:
        """Settings of which short runs and the validation split choose one before training; none where all are given.

        A method with candidates is made anew with the chosen one; attached by itself it takes the largest.
        """
        return []

    @abstractmethod
    def attach(self, model: nn.Module, family: Family, calibration: Calibration | None = None) -> nn.Module:
        """Return the model with the adapter in it, right after seeding; just what is trained requires a gradient."""
        raise NotImplementedError

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Groups of trained parameters, each `{"names": [...], "lr_scale": float}`; each trained tensor in just one.

        `"decays": False` spares a group's matrices the weight decay too. `"lr"` in place of a scale is a highest rate
        of its own, `"optimiser": "sgd"` plain descent in place of AdamW, and `"clip_norm"` a largest gradient norm of
        its own (None does not clip); the groups that name none are clipped together, as the recipe says.
        """
        return [{"names": [n for n, p in model.named_parameters() if p.requires_grad], "lr_scale": 1.0}]

    def stages(self, total_steps: int) -> list[Stage]:
        """The stretches of training; their steps add up to `total_steps`."""
        return [Stage("train", total_steps)]

    def take_optimiser(self, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        """Called with each stage's optimiser before its first step, its state back in it where a run resumes."""

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called after optimiser step `step` (counted from 1), with gradients still there."""

    def measured(self, model: nn.Module, value: float, higher_is_better: bool, rows: int = 0) -> None:
        """Called after each measurement of the validation split, before a checkpoint.

        `value` is the task's metric on so many rows, 0 where that is not known.
        """

    def batch_loss(self, model: nn.Module, batch: dict[str, torch.Tensor], loss: torch.Tensor) -> torch.Tensor:
        """What is minimised on a micro-batch in place of the task's loss; right after the model's forward pass.

        Args:
            model: The bare model.
            batch: What it has just seen.
            loss: The task's loss, summed over the supervised positions; what comes back is a sum over them too.
        """
        return loss

    def beside(self) -> list[nn.Module]:
        """Modules that `batch_loss` computes with and that are no part of the model."""
        return []

    def penalty(self, model: nn.Module) -> torch.Tensor | None:
        """A scalar added to the mean loss of every optimiser step, or None."""
        return None

    def log(self, model: nn.Module) -> dict[str, float]:
        """Numbers of the last step for its line of metrics.jsonl, beside the loop's own."""
        return {}

    def state(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold beside the trained tensors for an exact resume; tensors by name."""
        return {}

    def restore(self, model: nn.Module, state: dict[str, torch.Tensor]) -> None:
        """Take back what `state` gave, after the stage's `start` and before the trained tensors come back."""

    def finish(self, model: nn.Module) -> None:
        """Called once after the last step, before the adapter is saved."""

    def at_start(self, model: nn.Module) -> AbstractContextManager[nn.Module] | None:
        """Within it the finished model is what training began with; None where that is the base. After `finish`."""
        return None

    def forms(self, model: nn.Module) -> list[Form]:
        """The base first, then what it was made into; none where there is nothing to compare. After `finish`."""
        return []

    def figures(self, model: nn.Module) -> list[dict[str, Any]]:
        """What the report shows of this method: `{"title", "x", "y", "labels"}` each."""
        return []
