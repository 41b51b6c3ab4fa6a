"""From a finished run to a folder with its model as ONNX: merged where the method merges, else with its modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from peftcli.artifacts import adapter, atomic, card, few_shot_merge, onnx_graph
from peftcli.artifacts.export import PROBE_BATCH, check_place, probes_of, split_of
from peftcli.artifacts.merge import Drift, check, compare, merged_in_float32, outputs
from peftcli.artifacts.run_folder import RunFolder
from peftcli.artifacts.tuned import Tuned, find, open_tuned
from peftcli.config import rerun
from peftcli.config.errors import CheckFailed, Mistake, UserError
from peftcli.config.schema import EpisodesConfig, RunConfig
from peftcli.data.single import read_split
from peftcli.methods import registry as methods

FILE, FILE_INT8, FILE_PT2, LABELS = "model.onnx", "model.int8.onnx", "model.pt2", "labels.json"
BOUND = 1e-3
"""Largest mean difference between ONNX Runtime and PyTorch at one position, as a share of the scores' spread. Both
compute in float32, where models of this house differ by 1e-5 at most."""
BOUND_INT8 = 0.3
"""Largest mean difference of the file with 8-bit weights over all positions, as a share of the scores' spread. A few
hundredths are usual; beyond this bound the rounding decides what the model says."""
MEASURED_ROWS = 256
"""Held-out rows that the files are measured on as the run was."""
MEASURED_BATCH = 16
IN_PYTORCH = "PyTorch"


def export_onnx(
    path: Path,
    to: Path,
    overrides: Sequence[str] = (),
    *,
    support: Path | None = None,
    int8: bool = False,
    pt2: bool = False,
    force: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a run's model as ONNX, in float32 and if asked with 8-bit weights too, and compare it with PyTorch's.

    An adapter is merged where its method merges. Where not, its modules become part of the graph. A model that was
    trained whole is written as it is.

    Args:
        path: The run's folder.
        to: The new folder; it may be there if it is empty.
        overrides: As `peftcli.config.rerun.load` allows.
        support: Of a few-shot run of pictures: the task whose model is written, compared on these pictures.
        int8: Write `model.int8.onnx` beside `model.onnx`.
        pt2: Write `model.pt2` beside it, a program of `torch.export`.
        force: Use the base although its weights are not those that the adapter was trained on.
        overwrite: Replace an earlier export at `to`.

    Returns:
        `merge`, a `Drift` of merging as a dict, None where nothing was merged; `files`, by name `bytes`, a `Drift` from
        the model in PyTorch as `drift`, `latency` and `metrics`, of the model in PyTorch without the first two;
        `metric`, the task's best; `measured_rows`; `threads`; and as `export`: `folder`, `rows`, `positions`,
        `outputs`, `source`, `notes`, `forced_base`.

    Raises:
        UserError: No finished run, or one whose model has no graph; a package is missing; `to` is taken.
        CheckFailed: As `export`, and `export-drift` where ONNX Runtime's outputs are beyond `BOUND`, or `BOUND_INT8`.
    """
    onnx_graph.check_installed()
    run = find(path)
    config = rerun.load(run.config, overrides)
    _check(run, config, support)
    check_place(to, overwrite)
    tuned = open_tuned(run.path, overrides, force=force)
    tuned.model.float().cpu()
    forced = tuned.forced_base
    ready, notes = _of_run(tuned, config) if support is None else _of_task(tuned, support)
    model, probes = ready.model, ready.probes
    told_NV = outputs(model, probes)
    report: dict[str, Any] = {
        "merge": asdict(ready.merged) if ready.merged else None,
        "files": {IN_PYTORCH: {"latency": onnx_graph.latency(model, _row(probes))}},
        "metric": tuned.task.best_metric,
        "threads": torch.get_num_threads(),
        "forced_base": forced,
        "rows": sum(len(next(iter(probe.values()))) for probe in probes),
        "positions": len(told_NV),
        "outputs": told_NV.shape[1],
        "source": ready.source,
    }
    with atomic.folder(to) as partial:
        written = _files(partial, model, probes, int8, pt2)
        for name, exported in written.items():
            report["files"][name] = _told_of(partial, name, exported, probes, told_NV, ready.base_NV)
        several = {IN_PYTORCH: model, **written}
        report["measured_rows"] = 0 if support is not None else _measure(tuned, several, report["files"])
        _write_words(tuned, ready.labels, partial)
        lineage = adapter.portable(tuned.lineage) | ready.lineage | {"onnx": report}
        adapter.describe(partial, lineage, card.onnx(lineage, tuned.tokenizer, {} if support else _told(run)))
    return report | {"folder": str(to), "notes": notes}


@dataclass(frozen=True)
class _Ready:
    """A model to be written, and what it is compared on.

    Attributes:
        model: Without PEFT's wrapper, where its method merges.
        merged: What merging did to its outputs; None where nothing was merged.
        probes: Real inputs in batches.
        base_NV: The untouched base's outputs on them.
        source: Where they are from.
        labels: In the order of the scores, where there are any.
        lineage: What it says otherwise than the run's.
    """

    model: nn.Module
    merged: Drift | None
    probes: list[dict[str, Tensor]]
    base_NV: Tensor
    source: str
    labels: list[str] | None
    lineage: dict[str, Any]


def _of_run(tuned: Tuned, config: RunConfig) -> tuple[_Ready, list[str]]:
    """The run's model, and notes."""
    probes, source, notes = probes_of(tuned)
    probes = [{name: part.cpu() for name, part in probe.items()} for probe in probes]
    model, merged, base_NV = _plain(tuned, config, probes)
    return _Ready(model, merged, probes, base_NV, source, tuned.task.labels, {}), notes


def _of_task(tuned: Tuned, support: Path) -> tuple[_Ready, list[str]]:
    """The model of the task that a support set is, and notes."""
    model, seen, notes = few_shot_merge.of_task(replace(tuned, device="cpu"), support)
    shown = seen.support
    probes = [
        {name: part[at : at + PROBE_BATCH] for name, part in shown.inputs.items()}
        for at in range(0, len(shown.classes_N), PROBE_BATCH)
    ]
    lineage = {"labels": shown.names, "task": few_shot_merge.as_pictures(tuned)}
    merged, source = seen.check(model, "merged"), "pictures of the support set"
    return _Ready(model, merged, probes, seen.base_NC, source, shown.names, lineage), notes


def _told_of(
    folder: Path, name: str, exported: nn.Module, probes: list[dict[str, Tensor]], told_NV: Tensor, base_NV: Tensor
) -> dict[str, Any]:
    """A file's size, drift and latency."""
    drift = compare(outputs(exported, probes), told_NV, base_NV)
    return {
        "bytes": sum(part.stat().st_size for part in folder.glob(f"{name}*")),
        "drift": asdict(_near(drift) if name == FILE_INT8 else _within(drift, name)),
        "latency": onnx_graph.latency(exported, _row(probes)),
    }


def _files(
    folder: Path, model: nn.Module, probes: list[dict[str, Tensor]], int8: bool, pt2: bool
) -> dict[str, nn.Module]:
    """Write the graph, with 8-bit weights and as a program too if asked, and open what was written."""
    onnx_graph.write(model, _example(probes), folder / FILE)
    found: dict[str, nn.Module] = {FILE: onnx_graph.Exported(folder / FILE)}
    if pt2:
        onnx_graph.write_program(model, _example(probes), folder / FILE_PT2)
        found[FILE_PT2] = onnx_graph.Program(folder / FILE_PT2)
    if int8:
        onnx_graph.quantise(folder / FILE, folder / FILE_INT8)
        found[FILE_INT8] = onnx_graph.Exported(folder / FILE_INT8)
    return found


def _check(run: RunFolder, config: RunConfig, support: Path | None) -> None:
    """Stop where there is no graph to write, before anything is loaded."""
    if isinstance(config.task, EpisodesConfig) and support is None:
        what = f"{run.path} tells apart the classes of whatever task it is given, so there is no graph of it alone"
        raise UserError(Mistake(what, "--onnx", hint="say which, by some pictures of each class: --support FOLDER"))
    if isinstance(config.task, EpisodesConfig) and config.task.reads == "text":
        what = (
            "a graph ends in the scores of a head, and a task of texts has none: its model gives the mean over a "
            "row's tokens, which is compared with the prototypes beside it"
        )
        hint = f"leave out --onnx: peft merge {run.path} --support {support} --to DIR"
        raise UserError(Mistake(what, "--onnx", hint=hint))
    method = methods.find(config.method.name)(config.method)
    if method.saves == "adapter" and adapter.read_config(run.adapter).is_prompt_learning:
        kind = getattr(config.method, "type", "") or config.method.name
        what = f"an adapter of method {kind} puts inputs of its own before the text, which ONNX has no place for"
        raise UserError(Mistake(what, "--onnx", hint=f"use the adapter itself: {run.adapter}"))


def _plain(tuned: Tuned, config: RunConfig, probes: list[dict[str, Tensor]]) -> tuple[nn.Module, Drift | None, Tensor]:
    """The model without PEFT's wrapper, what merging did to its outputs, and the untouched base's outputs [N, V]."""
    if not isinstance(tuned.model, PeftModel):
        return tuned.model, None, outputs(tuned.model, probes)
    tuned_NV = outputs(tuned.model, probes)
    with tuned.model.disable_adapter():
        base_NV = outputs(tuned.model, probes)
    if not methods.find(config.method.name)(config.method).capabilities.merges:
        return tuned.model.get_base_model(), None, base_NV
    merged = merged_in_float32(tuned.model)
    drift = compare(outputs(merged, probes), tuned_NV, base_NV)
    return merged, check(drift, config.training.merge_tolerance, "merged", torch.float32), base_NV


def _within(drift: Drift, file: str) -> Drift:
    """Give back the drift. Raises CheckFailed `export-drift` beyond the bound."""
    if not drift.share <= BOUND:
        what = (
            f"outputs of {file} differ from PyTorch's by {drift.mean:.3g} in the mean and {drift.largest:.3g} at "
            f"most, where their spread is {drift.spread:.3g}; at the worst position by {drift.share:.2%} of it, and "
            f"{BOUND:.2%} is allowed"
        )
        raise CheckFailed("export-drift", what, "use the merged folder instead: peft merge without --onnx")
    return drift


def _near(drift: Drift) -> Drift:
    """Give back the drift. Raises CheckFailed `export-drift` where 8-bit weights change the answers themselves."""
    if not drift.mean <= BOUND_INT8 * drift.spread:
        what = (
            f"8-bit weights change the scores by {drift.mean:.3g} in the mean, where their spread is "
            f"{drift.spread:.3g} ({BOUND_INT8:.0%} of it is allowed); {drift.agreement:.1%} of answers stay the same"
        )
        raise CheckFailed("export-drift", what, "leave out --int8: this model does not bear it")
    return drift


def _example(probes: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Two rows to follow through the model, other in number and length than those that are compared."""
    first = {name: part[[0, -1]] for name, part in probes[0].items()}
    length = min(part.shape[1] for part in first.values())
    return {name: part if part.dim() == 4 else part[:, : max(2, length // 2)] for name, part in first.items()}


def _row(probes: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The first row without its padding."""
    row = {name: part[:1] for name, part in probes[0].items()}
    if "attention_mask" not in row:
        return row
    real_L = row["attention_mask"][0].bool()
    return {name: part[:, real_L] for name, part in row.items()}


def _measure(tuned: Tuned, ready: dict[str, nn.Module], files: dict[str, dict[str, Any]]) -> int:
    """Add `metrics` to each file's entry, of up to `MEASURED_ROWS` rows from all over the held-out split; return how
    many there are. Scores of words are not measured: their tasks need a model that gives hidden states."""
    if tuned.task.architecture == "causal-lm":
        return 0
    try:
        rows, _ = read_split(tuned.config.data, tuned.task.needed, split_of(tuned))
    except UserError:
        return 0  # a note of the comparison says so already
    step = -(-len(rows) // MEASURED_ROWS)
    encoded = tuned.task.encode_split(rows.select(range(0, len(rows), step)), tuned.tokenizer)
    for name, model in ready.items():
        found = tuned.task.evaluate(model, encoded, tuned.tokenizer, batch_size=MEASURED_BATCH, device="cpu")
        files[name]["metrics"] = found.metrics
    return len(encoded)


def _write_words(tuned: Tuned, labels: list[str] | None, folder: Path) -> None:
    """The tokenizer's or image reader's files, and the labels in the order of the scores."""
    tuned.tokenizer.save_pretrained(folder)
    if labels is not None:
        atomic.write_json(folder / LABELS, labels)


def _told(run: RunFolder) -> dict[str, dict[str, float]]:
    rows = run.read_report()["quality"]["rows"]
    return {"tuned, before export": next((row["metrics"] for row in rows if row["name"] == "tuned"), {})}
