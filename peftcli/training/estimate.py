"""What a run will hold in memory, from shapes alone: no weights are read and none are made."""

from __future__ import annotations

import gc
import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from types import MethodType
from typing import Any, Literal

import psutil
import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from peft import get_peft_model_state_dict
from torch import nn

from peftcli.config.errors import CheckFailed, Mistake, UserError
from peftcli.config.schema import RunConfig
from peftcli.data.collate import IGNORE
from peftcli.methods import registry as methods
from peftcli.methods.contract import Method
from peftcli.models import loading, precision
from peftcli.models.loading import LoadedModel
from peftcli.training import closing, ledger, workload
from peftcli.training.ledger import Ledger
from peftcli.training.prepare import Attached
from peftcli.training.workload import Shape, Workload

STEPS = 1_000_000
"""Length of a run of unknown length, for methods that ask."""
CPU_BUFFERS = 0.0
REFUSED = (RuntimeError, NotImplementedError, UserError)


@dataclass(frozen=True)
class Held:
    """Bytes at the fullest moment of one process."""

    weights: int
    """The frozen base with its buffers, in the type it is loaded in; of a method that trains all, those weights."""
    adapter: int
    """What the method puts beside it."""
    gradients: int
    optimiser: int
    activations: int
    """Kept from the forward pass for the backward pass."""
    temporaries: int
    """What comes and goes on top of it at the fullest moment."""

    @property
    def peak(self) -> int:
        """All of it."""
        return sum(asdict(self).values())

    @property
    def growth(self) -> int:
        """What training adds to the loaded base."""
        return self.peak - self.weights


@dataclass
class Estimate:
    """What `peft estimate` prints.

    Attributes:
        parameters: `total`, `trainable` and `by_role`, as in the report of a run.
        weights_by_dtype: Bytes of the loaded base by the name of their type.
        file_bytes: Size of what is saved at the end.
        heaviest: The largest micro-batch and what is held with it.
        mean: The same for rows of mean length; None where the rows are not here.
        measuring: Bytes held at most while nothing is trained; None where nothing is measured.
        program: Bytes of Python and its libraries in one process; on a GPU none.
        processes: Processes that share the memory: those on this CPU, or one a GPU.
        device, precision: What was counted for.
        free: Bytes that are free on this machine now; None for a device that is not here.
        steps: Optimiser steps of the run, where known.
        notes: What was assumed.
    """

    parameters: dict[str, Any]
    weights_by_dtype: dict[str, int]
    file_bytes: int
    heaviest: tuple[Shape, Held]
    mean: tuple[Shape, Held] | None
    measuring: int | None
    program: int
    processes: int
    device: str
    precision: str
    free: int | None
    steps: int | None
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """Bytes held at most by all processes that share the memory."""
        held = self.heaviest[1]
        return self.processes * (self.program + max(held.peak, self.measuring or 0))

    @property
    def fits(self) -> bool | None:
        """Whether this machine has that much free now; None where it has no such device."""
        return None if self.free is None else self.peak <= self.free

    def plain(self) -> dict[str, Any]:
        """All of it as plain data."""
        rows = {"heaviest": self.heaviest, "mean": self.mean}
        memory = {
            name: {**asdict(found[0]), **asdict(found[1]), "growth": found[1].growth, "peak": found[1].peak}
            for name, found in rows.items()
            if found
        }
        rest = {name: value for name, value in vars(self).items() if name not in rows}
        return {**rest, "memory": memory, "peak": self.peak, "fits": self.fits}


def estimate(config: RunConfig) -> Estimate:
    """Count a run's parameters and memory on the meta device. Asks no network where `model.shape` is given.

    Raises:
        UserError: The recipe's model, method or rows do not go together, or cannot be counted from shapes.
        CheckFailed: A target that matches nothing, or rows that are here and cannot be learnt from.
    """
    return count(config, workload.find(config))


def count(config: RunConfig, work: Workload) -> Estimate:
    """As `estimate`, with the micro-batches given."""
    device, chosen, notes = _place(config)
    loaded, model, method = _attach(config, work.task, chosen)
    total, base = sum(ledger.held_by(loaded.model).values()), _base_bytes(config, work.task, chosen)
    with ledger.pretending(model, device):
        for stage in method.stages(work.steps or STEPS):  # the last one trains most
            if stage.start:
                stage.start(model)
        body = model if method.saves == "adapter" else loaded.model
        whole = sum(ledger.held_by(body).values())
        beside = whole - sum(base.values()) if method.saves == "adapter" else 0
        if config.training.gradient_checkpointing:
            _recompute(model)
        forward = _as_in_training(model, chosen, device)
        held = {
            name: _step(config, forward, work, shape, (whole - beside, beside), device)
            for name, shape in (("heaviest", work.heaviest), ("mean", work.mean))
            if shape
        }
        measuring = _measure(forward, work, device) + whole if work.measured else None
        found = Attached(loaded, model, method, {}, torch.empty(0))
        parameters = closing.parameters(found)
    return Estimate(
        parameters=parameters,
        weights_by_dtype={str(dtype).removeprefix("torch."): size for dtype, size in base.items()},
        file_bytes=_file_bytes(model, method),
        heaviest=(work.heaviest, held["heaviest"]),
        mean=(work.mean, held["mean"]) if work.mean else None,
        measuring=measuring,
        program=0 if device == "cuda" else psutil.Process().memory_info().rss,
        processes=config.launch.processes if device == "cpu" else 1,
        device=device,
        precision=chosen,
        free=_free(device, config),
        steps=work.steps,
        notes=work.notes + notes,
    )
