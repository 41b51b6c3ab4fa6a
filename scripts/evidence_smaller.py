"""Runs of scripts/evidence_rowcol.py: an original, what is made of it, adapters; what each says of its test rows.

Every run goes through the parts of `peft train`. A row of pictures has the log-odds of the label that is looked for, or
whether the answer is right; a row of text has the share of its answer's tokens that are likeliest.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence import Prepared, Result, material_of, prepared, trained
from evidence_scores import auroc
from torch import nn

from peftcli.methods.contract import Calibration, Capabilities
from peftcli.methods.distillation import Distilled, blocks_of
from peftcli.models.family import Family

PATIENCE = 3
"""Of the latencies, as a report takes it."""


class Magnitude(Distilled):
    """The smallest weights of what `compress` may rebuild are zero and stay zero; all else as with `compress`."""

    capabilities = Capabilities(merges=False, unloads=False, several_adapters=False, identity_at_start=False)
    saves = "model"

    def __init__(self, settings: Any):
        super().__init__(settings)
        self._masks: list[tuple[nn.Parameter, torch.Tensor]] = []

    def attach(self, model: nn.Module, family: Family, calibration: Calibration | None = None) -> nn.Module:
        """As many numbers are left as the target says."""
        import copy

        from peftcli.config import targets
        from peftcli.methods.rowcol import costing, planning

        _, share = targets.read(self.settings.target)
        teacher = copy.deepcopy(model)
        things, _ = planning.find(model, family, ())
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(family.learns(name))
        weights = [weight for thing in things for weight in thing.weights]
        sizes = torch.cat([weight.detach().abs().flatten() for weight in weights])
        fewer = round((1 - share) * costing.backbone(model, family))
        bound = sizes.kthvalue(fewer).values
        self._masks = [(weight, weight.detach().abs() > bound) for weight in weights]
        self.after_step(model, 0)
        self.taught_by(model, teacher, blocks_of(model, family))
        return model

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        """Zeros stay."""
        for weight, mask in self._masks:
            weight.mul_(mask)


@contextmanager
def _arm(pruned: bool) -> Iterator[None]:
    """Within it the mode `compress` is magnitude pruning, where that is asked for."""
    from peftcli.methods.rowcol import tuner

    own = tuner.MODES["compress"]
    tuner.MODES["compress"] = Magnitude if pruned else own
    try:
        yield
    finally:
        tuner.MODES["compress"] = own


def original(recipe: str, overrides: Sequence[str], folder: str) -> Result:
    """Fine-tune all weights and keep the model in a folder.

    Returns:
        What the others return, too: `after` (of the test rows, see `told`), `validation`, `trained`, `seconds`.
    """
    from peftcli.tasks.contract import Evaluation
    from peftcli.training import closing, loop

    with _ready(recipe, overrides) as found:
        loop.train(found.job)
        seconds = time.perf_counter() - found.began
        found.job.method.finish(found.job.model)
        closing.save(found.job.run, found.attached, found.material, found.job.config, Evaluation({}))
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(found.job.run.model, folder)
        return {**_both(found), "trained": trained(found.job.model), "seconds": round(seconds, 1)}


def smaller(recipe: str, overrides: Sequence[str], pruned: bool = False) -> Result:
    """Make a model smaller, look at it, train it, look again.

    Args:
        recipe: As for the original.
        overrides: With the original's folder as the model.
        pruned: By magnitude, in place of what the recipe says.

    Returns:
        `before` and `after` training, `validation`, `backbone` (parameters that are not zero), `figures` and `notes` of
        the method.
    """
    from peftcli.methods.rowcol import costing
    from peftcli.training import loop

    with _arm(pruned), _ready(recipe, overrides) as found:
        job = found.job
        before = told(found, found.material.test)
        loop.train(job)
        seconds = time.perf_counter() - found.began
        job.method.finish(job.model)
        backbone = costing.backbone(job.model, found.attached.loaded.family)
        zeros = sum(int((mask == 0).sum()) for _, mask in getattr(job.method, "_masks", ()))
        return {
            "before": before,
            **_both(found),
            "backbone": backbone - zeros,
            "figures": job.method.figures(job.model),
            "notes": job.method.notes,
            "attach_seconds": round(found.attach_seconds, 1),
            "seconds": round(seconds, 1),
        }


def timed(recipe: str, overrides: Sequence[str]) -> Result:
    """What a model costs that was made smaller, beside its original, as a report has it: `rows`."""
    from peftcli.training import costs, prepare

    with _ready(recipe, [*overrides, "training.max_steps=0"]) as found:
        job = found.job
        job.method.finish(job.model)
        batches, chosen = costs.batches_of(found.attached.probe), prepare.arithmetic(job.config, job.accelerator)
        forms = job.method.forms(job.model)
        return costs.measure(job.model, forms, batches, chosen, job.accelerator.device, PATIENCE)


def adapter(recipe: str, overrides: Sequence[str]) -> Result:
    """Train an adapter; `trained` has no head."""
    from peftcli.training import loop

    with _ready(recipe, overrides) as found:
        loop.train(found.job)
        seconds = time.perf_counter() - found.began
        named = found.job.model.named_parameters()
        count = sum(p.numel() for n, p in named if p.requires_grad and ".modules_to_save." not in n)
        return {**_both(found), "trained": count, "seconds": round(seconds, 1)}


def _both(found: Prepared) -> Result:
    validation = told(found, found.material.validation)
    return {"after": told(found, found.material.test), "validation": mean(validation)}


def mean(rows: Result) -> float:
    """The metric of what `told` says."""
    return auroc(rows["values"], rows["truth"]) if "truth" in rows else float(np.mean(rows["values"]))


def told(found: Prepared, split: Any) -> Result:
    """`values` of a split's rows in their order; with a label that is looked for also the `truth` about it."""
    if found.job.task.architecture != "image-classification":
        return {"values": _right_tokens(found, split)}
    task, truth = found.job.task, [labels[0] for labels in split.rows["labels"]]
    logits = _logits(found, split)
    if task.config.positive is None:
        return {"values": [int(right) for right in (logits.argmax(1) == torch.tensor(truth))]}
    positive = task.labels.index(task.config.positive)
    scores = logits[:, positive] - logits[:, 1 - positive]
    return {"values": [round(x, 4) for x in scores.tolist()], "truth": [int(label == positive) for label in truth]}


def _logits(found: Prepared, gallery: Any) -> torch.Tensor:
    from peftcli.tasks.inference import measuring

    job, parts = found.job, []
    with measuring(job.model, job.accelerator.device, job.precision):
        for at in range(0, len(gallery), job.config.training.eval_batch_size):
            places = range(at, min(at + job.config.training.eval_batch_size, len(gallery)))
            pixels = job.task.collate(gallery.take(places), job.feed.tokenizer)["pixel_values"]
            parts.append(job.model(pixel_values=pixels).logits.float())
    return torch.cat(parts)


def _right_tokens(found: Prepared, encoded: Any) -> list[float]:
    from torch.nn import functional

    from peftcli.models.positions import select
    from peftcli.tasks.inference import measuring, to_batch

    job, shares = found.job, [0.0] * len(encoded)
    with measuring(job.model, job.accelerator.device, job.precision):
        for places in encoded.by_length(job.config.training.eval_batch_size):
            batch = to_batch(encoded.take(places), job.feed.tokenizer, job.accelerator.device)
            next_BL = functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
            mask_BL = next_BL != -100
            with select(job.model, mask_BL):
                logits = job.model(**batch).logits
            right = (logits.reshape(-1, logits.shape[-1]).argmax(1) == next_BL[mask_BL]).float()
            for place, part in zip(places, right.split(mask_BL.sum(1).tolist()), strict=True):
                shares[place] = round(part.mean().item(), 4)
    return shares


@contextmanager
def _ready(recipe: str, overrides: Sequence[str]) -> Iterator[Prepared]:
    with prepared(recipe, overrides, lambda config: material_of(config, _reader(config.model))) as found:
        yield found


def _reader(model: Any) -> str:
    """Models of one case read pictures and words alike: what its seeds' folders have in common."""
    return str(model.name) if model.source != "folder" else Path(model.name).name.split("-seed")[0]
