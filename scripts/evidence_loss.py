"""What an evidence script that compares losses is made of: a run with its test rows, the untouched base, what a step
costs, and the figures that are made from them.

B rows of a batch, L tokens, S supervised positions, V words.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any

import numpy as np
from evidence import Prepared, Result, prepared, trained
from resident import largest

SMOOTHED = 0.25
"""Share of the steps over which a training loss is averaged."""
PEAK_STEPS, TURNS = 2, 7
ROWS = 16
"""Rows at once when nothing is trained."""


def losses(recipe: str, overrides: list[str]) -> Result:
    """Train a recipe through the parts of `peft train` and measure it.

    Returns:
        `validation` loss of a token, `rows` (summed loss of each test row), `train` and `norms` (loss and gradient norm
        of each step), `trained` parameters, `bytes` of the saved adapter, `notes` of the method, `seconds` of attaching
        and training.
    """
    from peftcli.tasks.contract import Evaluation
    from peftcli.training import closing, loop

    with prepared(recipe, overrides) as found:
        job, material = found.job, found.material
        loop.train(job)
        steps = [row for row in job.run.metrics() if "loss" in row]
        count, seconds = trained(job.model), time.perf_counter() - found.began
        job.method.finish(job.model)
        kept = closing.save(job.run, found.attached, material, job.config, Evaluation({}))
        validation, tokens = row_losses(found, job.model, material.validation)
        return {
            "validation": sum(validation) / sum(tokens),
            "rows": row_losses(found, job.model, material.test)[0],
            "train": [round(row["loss"], 5) for row in steps],
            "norms": [round(row["grad_norm"], 5) for row in steps],
            "trained": count,
            "bytes": kept["bytes"],
            "notes": job.method.notes,
            "seconds": round(seconds, 2),
        }


def untouched(recipe: str, overrides: list[str]) -> Result:
    """The base on the same test rows and training batches: `rows`, their `tokens`, and `train`."""
    from peftcli.tasks.inference import measuring

    with prepared(recipe, overrides) as found:
        job, loss = found.job, found.job.task.loss
        with job.model.disable_adapter():
            rows, tokens = row_losses(found, job.model, found.material.test)
            train = []
            with measuring(job.model, job.accelerator.device, job.precision):
                for step in range(job.steps):
                    parts = [
                        loss(job.model, batch)
                        for batch in job.feed.micro_batches(*divmod(step, job.feed.steps_per_epoch))
                    ]
                    train.append(float(sum(part.total for part in parts)) / sum(part.weight for part in parts))
    return {"rows": rows, "tokens": tokens, "train": [round(value, 5) for value in train]}


def row_losses(found: Prepared, model: Any, encoded: Any) -> tuple[list[float], list[int]]:
    """Loss in nats, summed over the answer, and number of tokens of each row; their sums are what the task measures."""
    import torch
    import torch.nn.functional as F

    from peftcli.data.collate import IGNORE
    from peftcli.models.positions import select
    from peftcli.tasks.inference import measuring, to_batch

    job, words = found.job, found.material.tokenizer
    totals, counts = [0.0] * len(encoded), [0] * len(encoded)
    with measuring(model, job.accelerator.device, job.precision):
        for picked in encoded.by_length(ROWS):
            batch = to_batch(encoded.take(picked), words, job.accelerator.device)
            next_BL = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
            mask_BL = next_BL != IGNORE
            with select(model, mask_BL):
                logits_SV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss_S = F.cross_entropy(
                logits_SV.reshape(-1, logits_SV.shape[-1]).float(), next_BL[mask_BL], reduction="none"
            )
            total_B = torch.zeros(len(picked)).index_add_(0, mask_BL.nonzero()[:, 0], loss_S)
            for place, total, count in zip(picked, total_B.tolist(), mask_BL.sum(1).tolist(), strict=True):
                totals[place], counts[place] = round(total, 4), count
    return totals, counts


def costs(recipe: str, ours: list[str], theirs: list[str]) -> Result:
    """What a step of one arm costs, beside another's in the same process.

    Returns:
        `peak` resident bytes during the first steps, before the other arm is loaded; `seconds` of a step; `ratio` to
        the other's in the same turn, the order changing from turn to turn. Medians.
    """
    with ExitStack() as open_runs:
        mine = _stage(open_runs, recipe, ours)
        peak = largest(mine.advance, PEAK_STEPS)
        other = _stage(open_runs, recipe, theirs)
        other.advance()
        turns = []
        for turn in range(TURNS):
            arms = [("mine", mine), ("other", other)]
            turns.append({name: _timed(stage) for name, stage in (arms if turn % 2 else arms[::-1])})
    return {
        "peak": peak,
        "seconds": round(median(turn["mine"] for turn in turns), 4),
        "ratio": round(median(turn["mine"] / turn["other"] for turn in turns), 4),
    }


def _stage(open_runs: ExitStack, recipe: str, overrides: list[str]) -> Any:
    from peftcli.training.casting import left_to_autocast
    from peftcli.training.checkpoints import Progress
    from peftcli.training.loop import StageLoop

    job = open_runs.enter_context(prepared(recipe, overrides)).job
    open_runs.enter_context(left_to_autocast(job.model, job.precision != "fp32"))
    stage = StageLoop(job, job.method.stages(job.steps)[0], Progress(), set(), None)
    job.model.train()
    return stage


def _timed(stage: Any) -> float:
    began = time.perf_counter()
    stage.advance()
    return time.perf_counter() - began


def per_token(results: Sequence[Result], tokens: Sequence[int]) -> np.ndarray:
    """[seeds, rows], whose mean over the rows is the loss of a token; a row counts by its tokens."""
    return np.array([result["rows"] for result in results]) * len(tokens) / sum(tokens)


def smooth(result: Result, base: Result) -> np.ndarray:
    """Training loss less the untouched base's on the same batch, mean of the last `SMOOTHED` of the steps."""
    gaps = np.array(result["train"]) - np.array(base["train"])
    width = max(1, round(SMOOTHED * len(gaps)))
    return np.convolve(gaps, np.full(width, 1 / width), "valid")


def reached(result: Result, base: Result, goal: float) -> float:
    """The first step by which `smooth` is down to the goal; infinite where it never is."""
    found = smooth(result, base)
    below = np.flatnonzero(found <= goal)
    return float(below[0] + 1 + len(result["train"]) - len(found)) if len(below) else float("inf")


def unevenness(result: Result) -> float:
    """Standard deviation of the gradient norm over its mean, without the steps of warm-up."""
    norms = result["norms"][round(0.1 * len(result["norms"])) :]
    return float(np.std(norms, ddof=1) / np.mean(norms))
