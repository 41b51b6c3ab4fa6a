"""From a finished run to a plain model folder: the run's own config says what to load and which rows to compare on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from peftcli.artifacts import adapter
from peftcli.artifacts.merge import merge
from peftcli.artifacts.run_folder import RunFolder
from peftcli.config import frozen
from peftcli.config.errors import Mistake, UserError
from peftcli.config.schema import RunConfig
from peftcli.data.collate import pad
from peftcli.models import loading, precision
from peftcli.tasks.contract import Encoded
from peftcli.tasks.tokens import pad_id
from peftcli.training import prepare

PROBE_ROWS = 8
"""Held-out rows that merged and unmerged outputs are compared on."""
PROBE_BATCH = 4


def export(path: Path, to: Path, dtype: str | None = None, force: bool = False) -> dict[str, Any]:
    """Merge a run's adapter into its base and write the result.

    Args:
        path: The run's folder.
        to: The new folder; it may be there if it is empty.
        dtype: Type of the saved weights by its PyTorch name; that of the training run if not given.
        force: Use the base although its weights are not those that the adapter was trained on.

    Returns:
        As `merge`, with `folder`.

    Raises:
        UserError: No run, no adapter in it, or `to` is taken or cannot be written to.
        CheckFailed: `unsafe-weights`, `adapter-keys`, `base-mismatch`, `merge-drift`, `disk-full`.
    """
    run = RunFolder.open(path)
    _check_places(run, to)
    adapter.read_config(run.adapter)
    config = frozen.load(run.config)
    prepare.use_cores(config.launch)
    material = prepare.load_material(config)
    # float32, so that the comparison sees what rounding does to the weights and no noise of 16-bit arithmetic.
    base = loading.load(
        replace(config.model, dtype="float32"), "fp32", material.task.architecture, material.task.labels
    )
    model = adapter.load(base.model, run.adapter, force=force)
    split, encoded = material.held_out if material.held_out[1] is not None else ("train", material.train)
    if not isinstance(encoded, Encoded):
        hint = "give it a test or validation split: data.test_share, data.validation_share"
        raise UserError(
            Mistake("a merge is checked on held-out rows, and this run has a training stream only", hint=hint)
        )
    report = merge(
        model,
        material.tokenizer,
        _probes(encoded, pad_id(material.tokenizer)),
        to,
        adapter.read_lineage(run.adapter),
        tolerance=config.training.merge_tolerance,
        dtype=_saved_type(config, dtype),
        metrics={"tuned, before merging": _tuned(run)},
    )
    return report | {"folder": str(to), "rows": min(PROBE_ROWS, len(encoded)), "split": split}


def _saved_type(config: RunConfig, dtype: str | None) -> torch.dtype:
    if dtype is None and config.model.dtype == "auto":
        return precision.DTYPES[precision.choose(config.training.precision, "cpu")]
    return getattr(torch, dtype or config.model.dtype)


def _check_places(run: RunFolder, to: Path) -> None:
    if run.model.is_dir() and not run.adapter.is_dir():
        hint = f"use it as it is, or copy it: {run.model}"
        raise UserError(Mistake(f"{run.path} trained a whole model, so there is no adapter to merge", hint=hint))
    if not run.adapter.is_dir():
        hint = f"continue the run to its end first: peft train --resume {run.path}"
        raise UserError(Mistake(f"{run.path} has no adapter yet; the run is {run.status}", hint=hint))
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(Mistake(f"{to} is already there and not empty", hint="choose another folder, or remove it"))


def _probes(encoded: Encoded, padding: int) -> list[dict[str, torch.Tensor]]:
    rows = encoded.take(range(min(PROBE_ROWS, len(encoded))))
    batches = [pad(rows[at : at + PROBE_BATCH], padding) for at in range(0, len(rows), PROBE_BATCH)]
    return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]


def _tuned(run: RunFolder) -> dict[str, float]:
    if not run.report.is_file():
        return {}
    rows = (run.read_report().get("quality") or {}).get("rows") or []
    return next((row["metrics"] for row in rows if row["name"] == "tuned"), {})
