"""From a finished run to a plain model folder: the run says what to load and which rows to compare on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from peftcli.artifacts import adapter
from peftcli.artifacts.merge import merge
from peftcli.artifacts.run_folder import RunFolder
from peftcli.artifacts.tuned import Tuned, find, open_tuned
from peftcli.config import rerun
from peftcli.config.errors import Mistake, UserError
from peftcli.config.schema import RunConfig
from peftcli.data.single import read_split
from peftcli.methods import registry as methods
from peftcli.models.precision import DTYPES

PROBE_ROWS = 32
"""Rows that merged and unmerged outputs are compared on."""
PROBE_BATCH = 4
INPUTS = ("input_ids", "attention_mask", "pixel_values")


def export(
    path: Path,
    to: Path,
    overrides: Sequence[str] = (),
    *,
    dtype: str = "same",
    force: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Merge a run's adapter into its base and write the result.

    Args:
        path: The run's folder.
        to: The new folder; it may be there if it is empty.
        overrides: As `peftcli.config.rerun.load` allows.
        dtype: Type of the saved weights, `fp32`, `bf16` or `fp16`; `same` is the type that the base had in training.
        force: Use the base although its weights are not those that the adapter was trained on.
        overwrite: Replace an earlier merge at `to`.

    Returns:
        As `merge`, with `folder`; `rows`, how many were compared; `source`, where they are from; `notes`.

    Raises:
        UserError: No finished run, no adapter in it or one that does not merge; `to` is taken or cannot be written to.
        CheckFailed: `unsafe-weights`, `adapter-keys`, `base-mismatch`, `merge-drift`, `disk-full`.
    """
    run = find(path)
    config = rerun.load(run.config, overrides)
    _check(run, config)
    check_place(to, overwrite)
    tuned = open_tuned(run.path, overrides, force=force)
    wanted = next(tuned.model.get_base_model().parameters()).dtype if dtype == "same" else DTYPES[dtype]
    # The base as rounded as in training, for that is what was measured; the comparison itself in float32, so that it
    # sees what rounding does to the merged weights and no noise of 16-bit arithmetic.
    tuned.model.float()
    probes, source, notes = probes_of(tuned)
    told = run.read_report()["quality"]["rows"]
    report = merge(
        tuned.model,
        tuned.tokenizer,
        probes,
        to,
        tuned.lineage,
        tolerance=config.training.merge_tolerance,
        dtype=wanted,
        metrics={"tuned, before merging": next((row["metrics"] for row in told if row["name"] == "tuned"), {})},
    )
    compared = sum(len(next(iter(probe.values()))) for probe in probes)
    return report | {"folder": str(to), "rows": compared, "source": source, "notes": notes}


def _check(run: RunFolder, config: RunConfig) -> None:
    """Stop where there is nothing to merge, before anything is loaded."""
    method = methods.find(config.method.name)(config.method)
    if method.saves == "model":
        hint = f"use it as it is, or copy it: {run.model}"
        raise UserError(Mistake(f"{run.path} trained a whole model, so there is no adapter to merge", hint=hint))
    if not method.capabilities.merges and config.task.type == "episodes":
        what = f"{run.path} has other weights for each few-shot task, so there is no merged model of it alone"
        raise UserError(Mistake(what, hint="say which task, by some examples of each class: --support FOLDER"))
    if not method.capabilities.merges:
        kind = getattr(config.method, "type", "") or config.method.name
        what = f"an adapter of method {kind} is no change of the base's weights, so it cannot be merged into them"
        hint = f"use the adapter itself: {run.adapter}"
        if not adapter.read_config(run.adapter).is_prompt_learning:
            hint += f"; or a graph with its modules in it: peft merge {run.path} --to DIR --onnx"
        raise UserError(Mistake(what, hint=hint))


def check_place(to: Path, overwrite: bool) -> None:
    """Raises UserError where a folder is taken: by anything but an earlier merge, or by one that is to be kept."""
    if not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return
    if not to.is_dir() or not (to / adapter.LINEAGE).is_file():
        raise UserError(Mistake(f"{to} is already there, and is no earlier merge", "--to", hint="name a new folder"))
    if not overwrite:
        hint = "name a new folder, or replace this one: --overwrite"
        raise UserError(Mistake(f"{to} is already there, an earlier merge", "--to", hint=hint))


def split_of(tuned: Tuned) -> str:
    """The split that the run was measured on; the training rows where there was none."""
    measured = tuned.run.read_report()["quality"]
    return measured["split"] if measured["rows_measured"] else "train"


def probes_of(tuned: Tuned) -> tuple[list[dict[str, torch.Tensor]], str, list[str]]:
    """Real inputs in batches, where they are from, and notes: held-out rows, else the texts that the report shows."""
    report, notes, split = tuned.run.read_report(), [], split_of(tuned)
    try:
        rows, _ = read_split(tuned.config.data, tuned.task.needed, split)
        found = tuned.task.encode_split(rows[:PROBE_ROWS], tuned.tokenizer)
        tokens, source = found.take(range(len(found))), f"rows of the {split} split"
    except UserError as error:
        if tuned.task.architecture == "image-classification":
            raise
        words = tuned.task.tokens(tuned.tokenizer)
        texts = [example["input"] for example in report["examples"][:PROBE_ROWS]]
        tokens, source = [{"input_ids": words.start + words.ids(text)} for text in texts], "texts of the run's report"
        notes.append(f"the rows of the {split} split cannot be read: {error.mistakes[0].what}")
        if not texts:
            raise
    batches = [
        tuned.task.collate(tokens[at : at + PROBE_BATCH], tuned.tokenizer, multiple=1)
        for at in range(0, len(tokens), PROBE_BATCH)
    ]
    probes = [{name: part.to(tuned.device) for name, part in batch.items() if name in INPUTS} for batch in batches]
    return probes, source, notes
