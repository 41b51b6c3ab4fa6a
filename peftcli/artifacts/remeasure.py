"""A finished run measured again: on its own held-out rows, where the numbers must come out the same, or on others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from peftcli.artifacts.tuned import Tuned
from peftcli.config import rerun
from peftcli.config.errors import UserError, unknown
from peftcli.config.schema import GenerationConfig
from peftcli.data import sources
from peftcli.data.origins import SPLITS
from peftcli.data.rows import Rows
from peftcli.data.single import read_split
from peftcli.data.sources import Splits
from peftcli.tasks.contract import Encoded, Evaluation, Quality


def remeasure(
    tuned: Tuned,
    overrides: Sequence[str],
    split: str = "",
    baselines: bool = False,
    limit: int | None = None,
    also: Callable[[Encoded], list[Quality]] | None = None,
) -> dict[str, Any]:
    """Measure the tuned model and the untouched base.

    Args:
        tuned: The run, opened with the same overrides.
        overrides: Those of `data` make the rows other ones than the run's own.
        split: train, validation or test; the one that the run's report is about if not given, or test where the
            overrides name such a split.
        baselines: Also what can be had without the model, which needs the training rows.
        limit: Measure so many rows at most, evenly drawn, and generate an answer to each of them.
        also: More rows of the table, measured on the same split.

    Returns:
        `split`; `own_rows`, whether the rows are those of the run; `quality`, as in report.json; `reported`, what
        the run's report says of the same rows, and `difference`, how far the tuned model's metrics are from that
        (both empty where it says nothing); `notes`; `forced_base`; `examples`, a row each.

    Raises:
        UserError: The rows are not there or cannot be read.
        CheckFailed: `label-mismatch` or `no-trainable-tokens`.
    """
    told = tuned.run.read_report()["quality"]
    split = split or _held_out(tuned, told["split"])
    if limit is not None and tuned.task.unit == "tasks":
        raise UserError("--limit counts rows, and this run is measured on few-shot tasks: --episodes N")
    rows, splits, own, notes = _rows(tuned, overrides, split, baselines)
    if limit is not None:
        rows = _some(tuned, rows, limit, notes)
    encoded = tuned.task.encode_split(rows, tuned.tokenizer)
    now = measure(tuned, tuned.model, encoded)
    simple = tuned.task.baselines(replace(splits, test=rows)) if baselines and splits is not None else []
    measured = [*_base(tuned, encoded), *simple, Quality("tuned", now.metrics, now.intervals)]
    measured += also(encoded) if also else []
    comparable = own and split == told["split"] and tuned.task.config == rerun.load(tuned.run.config).task
    rows_told = {row["name"]: row["metrics"] for row in told["rows"]}
    reported: dict[str, float] = rows_told.get("tuned", {}) if comparable and limit is None else {}
    notes += tuned.task.notes
    notes += [f"{split}: {n} rows {what}" for what in ("truncated", "dropped") if (n := encoded.counts[what])]
    return {
        "run": str(tuned.run.path),
        "split": split,
        "own_rows": own,
        "quality": {
            "metric": tuned.task.best_metric,
            "higher_is_better": tuned.task.higher_is_better,
            "unit": tuned.task.unit,
            "split": split,
            "rows_measured": len(encoded),
            "rows_generated": len(now.examples),
            "protocol": tuned.task.protocol(),
            "answers": now.answers,
            "rows": [asdict(row) for row in measured],
        },
        "reported": reported,
        "difference": {name: now.metrics[name] - value for name, value in reported.items() if name in now.metrics},
        "notes": notes,
        "forced_base": tuned.forced_base,
        "examples": now.examples,
    }


def _base(tuned: Tuned, encoded: Encoded) -> list[Quality]:
    """The untouched base, where it answers: a new head has no answer of its own."""
    if tuned.task.architecture != "causal-lm" and not tuned.task.base_answers:
        return []
    with tuned.untouched() as base:
        before = measure(tuned, base, encoded)
    return [Quality("untouched base", before.metrics, before.intervals)]


def _some(tuned: Tuned, rows: Rows, limit: int, notes: list[str]) -> Rows:
    """The first, and then every so many a row, and a task that answers all of them."""
    notes.append(f"measured {min(limit, len(rows))} of {len(rows)} rows, evenly drawn (--limit {limit})")
    if isinstance(tuned.task.config, GenerationConfig):
        tuned.task.config = replace(tuned.task.config, generated_rows=limit)
    return rows.select(i * len(rows) // limit for i in range(limit)) if limit < len(rows) else rows


def measure(tuned: Tuned, model: Any, encoded: Encoded) -> Evaluation:
    """Measure the run's model, or its base, as at the end of training."""
    return tuned.task.evaluate(
        model,
        encoded,
        tuned.tokenizer,
        batch_size=tuned.config.training.eval_batch_size,
        device=tuned.device,
        precision=tuned.precision,
        generate=True,
    )


def _held_out(tuned: Tuned, reported: str) -> str:
    data = tuned.config.data
    return "test" if "test" in data.files or "test" in data.splits else reported


def _rows(
    tuned: Tuned, overrides: Sequence[str], split: str, whole: bool
) -> tuple[Rows, Splits | None, bool, list[str]]:
    """The rows to measure, all splits if they were read, whether they are the run's own, and notes."""
    config, needed = tuned.config.data, tuned.task.needed
    other = any(override.lstrip("+~").startswith("data") for override in overrides)
    if other and not whole:
        rows, notes = read_split(config, needed, split)
        return rows, None, False, notes
    splits = sources.load(config, needed)
    have = {name: rows for name in SPLITS if isinstance(rows := getattr(splits, name), Rows)}
    if split not in have:
        raise UserError(unknown("split", split, have, where="--split", hint=f"or name one: data.files.{split}=FILE"))
    own = splits.fingerprint == tuned.lineage["data_fingerprint"]
    notes = list(splits.notes)
    if not own and not other:
        notes.append("the rows have changed since the run was made, so its report is not compared with")
    return have[split], splits, own, notes
