"""Exact checkpoints: trained tensors, optimiser state and the loop's place, each folder whole or not there.

A checkpoint is written under a temporary name; its marker `complete` comes last and the folder is renamed then, so
that a kill at any moment leaves either the former checkpoints or one more. Random streams are derived from the seed
and the step (`seeds`), so no generator state is saved.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from peftcli.artifacts import atomic
from peftcli.config.errors import CheckFailed
from peftcli.training import sharding


@dataclass
class Progress:
    """Where the loop stands between two optimiser steps."""

    step: int = 0
    """Optimiser steps done, over all stages."""
    stage: int = 0
    """Index of the stage of the next step."""
    stage_step: int = 0
    """Steps done within that stage."""
    epoch: int = 0
    position: int = 0
    """Batches of this epoch already seen."""
    tokens: int = 0
    rows: int = 0
    best: float | None = None
    best_step: int | None = None
    without_better: int = 0
    """Measurements since the best one."""
    stopped_early: bool = False
    zero_gradients: int = 0
    """Steps in a row, up to this one, with a gradient of exactly zero."""
    train_seconds: float = 0.0
    kept_prefix: bool | None = None
    """Whether this stage keeps what the model's frozen beginning makes of each row."""


@dataclass
class Checkpoint:
    """What one folder under `checkpoints/` holds."""

    progress: Progress
    trained: dict[str, torch.Tensor]
    optimiser: dict[str, torch.Tensor]
    method: dict[str, torch.Tensor]
    """What the method needs beside its trained tensors."""
    scaler: dict[str, Any] | None
    """State of fp16's loss scale."""


def folder_of(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def save(root: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint whole and return its folder."""
    final = folder_of(root, checkpoint.progress.step)
    place = {"progress": asdict(checkpoint.progress), "scaler": checkpoint.scaler}
    with atomic.folder(final) as partial:
        atomic.write_tensors(partial / "trained.safetensors", checkpoint.trained)
        atomic.write_tensors(partial / "optimiser.safetensors", checkpoint.optimiser)
        atomic.write_tensors(partial / "method.safetensors", checkpoint.method)
        atomic.write_json(partial / "progress.json", place)
        atomic.write_text(partial / "complete", "")
    return final


def complete(root: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    return sorted(p for p in root.glob("step-*") if (p / "complete").is_file()) if root.is_dir() else []


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckFailed: A file of it is missing or truncated.
    """
    try:
        place = json.loads((folder / "progress.json").read_text())
        known = {f.name for f in fields(Progress)}
        return Checkpoint(
            Progress(**{k: v for k, v in place["progress"].items() if k in known}),
            load_file(folder / "trained.safetensors"),
            load_file(folder / "optimiser.safetensors"),
            load_file(folder / "method.safetensors"),
            place["scaler"],
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckFailed(
            "broken-checkpoint",
            f"{folder} cannot be read: {error}",
            "remove that folder and resume again: the checkpoint before it is used, or the last step in place of the "
            "best one",
        ) from error


def latest(root: Path) -> Checkpoint | None:
    """The newest complete checkpoint, or None where there is none."""
    found = complete(root)
    return load(found[-1]) if found else None


def prune(root: Path, keep: int, best_step: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    found = complete(root)
    for folder in found[: max(0, len(found) - keep)]:
        if best_step is None or folder != folder_of(root, best_step):
            shutil.rmtree(folder)


def trained_tensors(model: nn.Module, names: set[str]) -> dict[str, torch.Tensor]:
    """Copies of the named parameters and buffers on the CPU; where they are cut up, every process has to ask."""
    named = ((n, sharding.whole(t.detach())) for n, t in _tensors(model).items() if n in names)
    return {n: t.to("cpu", copy=True).contiguous() for n, t in named}


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def restore(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Put tensors back in place, bit for bit.

    Raises:
        CheckFailed: The model has no such parameter or buffer, or of another shape.
    """
    there = _tensors(model)
    wrong = [n for n, t in tensors.items() if n not in there or there[n].shape != t.shape]
    if wrong:
        raise CheckFailed("adapter-keys", f"the checkpoint's tensors do not fit this model: {', '.join(wrong[:5])}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            there[name].copy_(sharding.like(there[name], tensor))
