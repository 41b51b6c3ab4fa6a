"""What a run will hold in memory, from shapes alone: no weights are read and none are made."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import psutil
import torch
from peft import get_peft_model_state_dict

from peftcli.config.schema import RunConfig
from peftcli.models import precision
from peftcli.training import closing, ledger, sharding, workload
from peftcli.training.shadow import Shadow
from peftcli.training.sharding import sharded
from peftcli.training.workload import Shape, Workload

STEPS = 1_000_000
"""Length of a run of unknown length, for methods that ask."""
STEP_COUNTER = 4
"""Bytes that AdamW keeps for each tensor beside its two moments."""
HOLES = {"cpu": 0.4 if platform.libc_ver()[0] == "glibc" else 0.0, "cuda": 0.1}
"""Memory that an allocator holds between and behind live blocks after a few steps, as a share of them; on a CPU as
`scripts/benchmark_estimate.py` finds it: glibc's heap never returns what lies below a block still in use."""


@dataclass(frozen=True)
class Held:
    """Bytes of one process at the fullest moment of a training step."""

    weights: int
    """The base as it is loaded."""
    adapter: int
    """What the method adds to it."""
    gradients: int
    """Those of all trained tensors, and with several processes the buffers they are averaged in."""
    optimiser: int
    activations: int
    """Kept from the forward pass for the backward pass."""
    temporaries: int
    """What comes and goes beside them."""
    apart: int
    """What of gradients and activations is never held at once: some activations go before the last gradients come."""
    holes: int
    """What the allocator holds beside activations and temporaries without using it."""

    @property
    def peak(self) -> int:
        """All of it."""
        return sum(asdict(self).values()) - 2 * self.apart

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
        heaviest: The largest micro-batch, and what is held with it.
        mean: The same for rows of mean length; None where the rows are not here.
        measuring: Bytes held at most while nothing is trained, over the loaded base; None where nothing is measured.
        program: Bytes of Python and its libraries in one process; none on a GPU.
        processes: Processes that share the memory: all on a CPU, one on a GPU.
        device: What was counted for.
        precision: Its arithmetic.
        free: Bytes that are free on this machine now; None where it has no such device.
        steps: Optimiser steps of the run, where they are known.
        notes: What was assumed.
        unit: What the length of a row counts: tokens, or pixels of a picture's side.
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
    unit: str = "tokens"
    devices: int = 1
    """GPUs that need so much each; 1 on a CPU, whose memory all processes share."""
    loading: int = 0
    """Bytes of the whole base, which a process holds in the CPU's memory for a moment before it is cut up."""

    @property
    def peak(self) -> int:
        """Bytes held at most by all processes that share the memory."""
        held = self.heaviest[1]
        training = held.weights + max(held.growth, self.measuring or 0)
        return self.processes * (self.program + max(training, self.loading if self.devices == 1 else 0))

    @property
    def fits(self) -> bool | None:
        """Whether so much is free now; None where this machine has no such device."""
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
    """Count a run's parameters and memory. Asks no network where `model.shape` is given.

    Raises:
        UserError: Model, method and rows do not go together, or the method cannot be counted from shapes.
        CheckFailed: A target matches nothing, or the rows are here and cannot be learnt from.
    """
    return count(config, workload.find(config))


def count(config: RunConfig, work: Workload) -> Estimate:
    """As `estimate`, for micro-batches that are known."""
    device, chosen, notes = _place(config)
    on_gpu = device == "cuda" or config.launch.device == "cuda"
    shadow = Shadow(config, work.task, chosen)
    if sharded(config):
        sharding.check(shadow.method, config.method.name)
    shadow.start_stages(work.steps or STEPS)
    shapes = {"heaviest": work.heaviest, "mean": work.mean}
    held, measuring = {}, None
    with ledger.pretending(shadow.modules(), device):
        shadow.as_in_training()
        for name, shape in shapes.items():
            held[name] = (shape, _held(config, shadow, shape, work.accumulates, device)) if shape else None
        if work.measured:
            brief = round((1 + HOLES[device]) * shadow.measure(work.measured, device))
            measuring = shadow.beside_bytes + _optimiser(shadow) + brief + (_at_work(shadow) if sharded(config) else 0)
    assert held["heaviest"] is not None
    return Estimate(
        parameters=closing.parameters(shadow),  # type: ignore[arg-type]  # reads the model and its family
        weights_by_dtype={str(dtype).removeprefix("torch."): size for dtype, size in shadow.base_bytes.items()},
        file_bytes=_file_bytes(config, work, chosen),
        heaviest=held["heaviest"],
        mean=held["mean"],
        measuring=measuring,
        program=0 if on_gpu else psutil.Process().memory_info().rss,
        processes=1 if on_gpu else config.launch.processes,
        device=device,
        precision=chosen,
        free=_free(device) if device in ("cpu", "cuda") and config.launch.device in ("auto", device) else None,
        steps=work.steps,
        notes=work.notes + notes + shadow.method.notes,
        unit="pixels" if work.task.architecture == "image-classification" else "tokens",
        devices=config.launch.world if on_gpu else 1,
        loading=sum(shadow.base_bytes.values()) if sharded(config) else 0,
    )


def _place(config: RunConfig) -> tuple[str, str, list[str]]:
    """The device and the precision that are counted for, and what was assumed."""
    asked, has_gpu = config.launch.device, torch.cuda.is_available()
    if asked in ("cuda", "mps") and not (asked == "cuda" and has_gpu):
        chosen = "bf16" if config.training.precision == "auto" else config.training.precision
        note = f"launch.device={asked} is counted with the kernels of a CPU, in {chosen}"
        return "cpu", chosen, [note]
    device = "cuda" if has_gpu and asked != "cpu" else "cpu"
    return device, precision.choose(config.training.precision, device), []


def _free(device: str) -> int:
    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available


def _held(config: RunConfig, shadow: Shadow, shape: Shape, accumulates: bool, device: str) -> Held:
    gradients = _bytes(shadow.trained())
    kept, most = shadow.step(shape, accumulates, device)
    held = Held(
        weights=sum(shadow.base_bytes.values()),
        adapter=shadow.beside_bytes,
        gradients=gradients * (1 if config.launch.world == 1 else 2),
        optimiser=_optimiser(shadow),
        activations=kept,
        temporaries=max(0, most - kept - gradients),
        apart=max(0, kept + gradients - most),
        holes=round(HOLES[device] * most),
    )
    return _cut_up(held, config, shadow) if sharded(config) else held


def _cut_up(held: Held, config: RunConfig, shadow: Shadow) -> Held:
    """The same with the base in parts."""
    at_work, world = _at_work(shadow), config.launch.world
    off = config.launch.offload and config.launch.device != "cpu"
    here = 0 if off else held.weights // world
    if shadow.method.saves == "adapter":
        return replace(held, weights=here, temporaries=held.temporaries + at_work)
    return replace(
        held,
        weights=here,
        adapter=held.adapter // world,
        gradients=0 if off else _bytes(shadow.trained()) // world,
        optimiser=0 if off else held.optimiser // world,
        temporaries=held.temporaries + 2 * at_work,  # and their gradients
    )


def _at_work(shadow: Shadow) -> int:
    """What is whole of a base in parts: two blocks, the one at work and the next, and what is no block all the time."""
    sizes = [_bytes(block.parameters()) for block in sharding.blocks(shadow.model)]
    return sum(shadow.base_bytes.values()) - sum(sizes) + 2 * max(sizes, default=0)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _optimiser(shadow: Shadow) -> int:
    trained = shadow.trained()
    return 2 * _bytes(trained) + STEP_COUNTER * len(trained)


def _file_bytes(config: RunConfig, work: Workload, chosen: str) -> int:
    """Size of the safetensors file that the run will leave: its header, then its tensors."""
    shadow = Shadow(config, work.task, chosen)
    shadow.method.finish(shadow.model)
    if shadow.method.saves == "adapter":
        with ledger.pretending([shadow.model], "cpu"):
            tensors = get_peft_model_state_dict(shadow.model, save_embedding_layers=False)
    else:
        tied = getattr(shadow.model, "all_tied_weights_keys", {})
        tensors = {name: t for name, t in shadow.model.state_dict().items() if name not in tied}
    head, at = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        size = _bytes([tensor])
        head[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, at + size]}  # type: ignore[dict-item]
        at += size
    return 8 + -(-len(json.dumps(head, separators=(",", ":"))) // 8) * 8 + at
