"""What an evidence script that compares scores is made of: a run on pictures with a score for each test row, the few
labels that a run may be given, and AUROC with intervals.

S seeds, P rows that have what is looked for, N rows that have not, D bootstrap samples.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from evidence import DRAWS, Prepared, Result, material_of, prepared, trained

KEPT_BACK = 0.25
"""Share of few labels that is kept for validation."""
TRIED = 4
"""Pictures on which the way through the last part of a model is compared with the whole one."""
_states: dict[tuple[str, str], dict[str, Any]] = {}
"""What frozen beginnings make of pictures, by place and weights, and the picture's name; the same for all runs."""


@dataclass(frozen=True)
class Few:
    """The labels that someone has.

    Attributes:
        rows: Labelled pictures of each class, those for validation among them.
        wrong: Share of them with the other label.
        seed: Of drawing rows and wrong labels; the wrong ones are among the same rows.
    """

    rows: int
    wrong: float
    seed: int


def scored(recipe: str, overrides: list[str], few: Few | None = None, measured: bool = False) -> Result:
    """Train a recipe through the parts of `peft train` and score its test pictures.

    Args:
        recipe: With two labels and one of them looked for.
        overrides: Of the recipe.
        few: The labels there are; None takes all.
        measured: Measure validation while training, as `peft train` does, so that the method may act on it.

    Returns:
        `scores` and `truth` (1 where the picture has what is looked for) of the test rows in their order, `validation`
        and `train` AUROC (of few rows only), `trained` parameters, `nonzero` ones of a sparse adapter's matrices,
        `bytes` of the saved adapter, `notes` of the method, `seconds` of attaching and training.
    """
    from peftcli.tasks.contract import Evaluation
    from peftcli.training import closing, loop

    with prepared(recipe, overrides, lambda config: drawn(material_of(config), few)) as found, _entered(found):
        job, material = found.job, found.material
        if measured:
            job.measure = closing.Measurer(material, material.validation, job.config, job.accelerator)
        loop.train(job)
        count, seconds = trained(job.model), time.perf_counter() - found.began
        job.method.finish(job.model)
        kept = closing.save(job.run, found.attached, material, job.config, Evaluation({}))
        scores, truth = _scores(found, material.test)
        return {
            "scores": [round(score, 4) for score in scores],
            "truth": truth,
            "validation": auroc(*_scores(found, material.validation)),
            "train": auroc(*_scores(found, job.feed.encoded)) if few else None,
            "trained": count,
            "nonzero": sum(int(p.count_nonzero()) for name, p in job.model.named_parameters() if _pruned(name, p)),
            "bytes": kept["bytes"],
            "notes": job.method.notes,
            "seconds": round(seconds, 2),
        }


def _pruned(name: str, parameter: Any) -> bool:
    return ".sparse_" in name and parameter.ndim == 2


def drawn(material: Any, few: Few | None) -> Any:
    """The material of a run, whose training and validation rows are those that someone has who labels few.

    The rows are drawn from the training rows, as many of each class; a quarter of each class is for validation, at
    random, for who labels few pictures does not know which are alike.
    """
    if few is None:
        return replace(material)
    generator = np.random.default_rng(few.seed)
    labels = np.array([labels[0] for labels in material.train.rows["labels"]])
    chosen = np.concatenate([generator.permutation(np.flatnonzero(labels == k))[: few.rows] for k in (0, 1)])
    turned = flipped(labels[chosen], few.wrong, generator)
    back = np.tile(np.arange(few.rows) < round(KEPT_BACK * few.rows), 2)
    parts = {"validation": back, "train": ~back}
    return replace(material, **{name: _rows(material.train, chosen[on], turned[on]) for name, on in parts.items()})


def flipped(labels: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """Labels 0 and 1 of which this share, of each the same, is the other one."""
    found = labels.copy()
    for label in (0, 1):
        of_label = np.flatnonzero(labels == label)
        found[generator.permutation(of_label)[: round(share * len(of_label))]] = 1 - label
    return found


def _rows(gallery: Any, chosen: np.ndarray, labels: np.ndarray) -> Any:
    from peftcli.data.rows import Rows

    rows = [{**gallery.rows[int(i)], "labels": [int(label)]} for i, label in zip(chosen, labels, strict=True)]
    return replace(
        gallery, rows=Rows.from_list(rows), lengths=[1] * len(rows), kept=[gallery.kept[at] for at in chosen]
    )


@contextmanager
def _entered(found: Prepared) -> Iterator[None]:
    """Rows come as what the frozen part of the model before all that is ever trained makes of them."""
    from peftcli.models import prefix
    from peftcli.training import checks

    job, material = found.job, found.material
    stages = {p: p.requires_grad for p in job.model.parameters()}
    for name, parameter in job.model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or ".sparse_" in name)
    with job.arithmetic():
        cut = prefix.find(job.model, found.attached.loaded.family, _pixels(job, material.train, range(TRIED)))
    for parameter, was in stages.items():
        parameter.requires_grad_(was)
    weights = checks.combined({name: checks.checksum(t.detach()) for name, t in cut.tensors().items() if t.numel()})
    states = _states.setdefault((cut.place, weights), {})
    job.feed.use(_hidden(job, cut, states, material.train))
    material.validation = _hidden(job, cut, states, material.validation)
    material.test = _hidden(job, cut, states, material.test)
    with prefix.entered(cut):
        yield


def _hidden(job: Any, cut: Any, states: dict[str, Any], gallery: Any) -> Any:
    import torch

    from peftcli.models import prefix

    names = gallery.rows["name"]
    missing = [place for place, name in enumerate(names) if name not in states]
    size = job.config.training.eval_batch_size
    with job.arithmetic():
        for at in range(0, len(missing), size):
            places = missing[at : at + size]
            found = prefix.hidden(cut, _pixels(job, gallery, places))
            states.update(zip((names[place] for place in places), found.clone(), strict=True))
    return replace(gallery, hidden=torch.stack([states[name] for name in names]))


def _pixels(job: Any, gallery: Any, places: Sequence[int]) -> Any:
    return job.task.collate(gallery.take(places), job.feed.tokenizer)["pixel_values"]


def _scores(found: Prepared, gallery: Any) -> tuple[list[float], list[int]]:
    """Log-odds of what is looked for, and whether it is there, of each row in order."""
    from peftcli.tasks.inference import measuring

    job, positive = found.job, found.job.task.labels.index(found.job.config.task.positive)
    scores: list[float] = []
    with measuring(job.model, job.accelerator.device, job.precision):
        for at in range(0, len(gallery), job.config.training.eval_batch_size):
            places = range(at, min(at + job.config.training.eval_batch_size, len(gallery)))
            logits = job.model(pixel_values=_pixels(job, gallery, places)).logits.float()
            scores += (logits[:, positive] - logits[:, 1 - positive]).tolist()
    return scores, [int(labels[0] == positive) for labels in gallery.rows["labels"]]


def auroc(scores: Sequence[float], truth: Sequence[int]) -> float:
    """Share of pairs of a row that has what is looked for and one that has not, in which the former scores higher."""
    return float(ranked(np.array([scores]), np.array(truth)).mean())


def ranked(scores_SR: np.ndarray, truth_R: np.ndarray) -> np.ndarray:
    """[S, P, N]: 1 where the first row of a pair scores higher, one half where both score the same."""
    ours, theirs = scores_SR[:, truth_R == 1, None], scores_SR[:, None, truth_R == 0]
    return (ours > theirs) + 0.5 * (ours == theirs)


def pairs(results: Sequence[Result]) -> np.ndarray:
    """`ranked` of runs on the same test rows; its mean is their mean AUROC."""
    return ranked(np.array([result["scores"] for result in results]), np.array(results[0]["truth"]))


def difference(ours_SPN: np.ndarray, theirs_SPN: np.ndarray, draws: int = DRAWS) -> tuple[float, float, float]:
    """Mean difference of two arms' AUROC, with its 95 % interval.

    A bootstrap sample draws seeds, and test rows of either kind, anew, the same for both arms.
    """
    gaps_SPN = ours_SPN - theirs_SPN
    generator = np.random.default_rng(0)
    shares = [generator.multinomial(n, [1 / n] * n, size=draws) / n for n in gaps_SPN.shape]
    by_seed = [((shares[1] @ gaps_PN) * shares[2]).sum(1) for gaps_PN in gaps_SPN]
    means_D = (np.stack(by_seed, 1) * shares[0]).sum(1)
    low, high = np.percentile(means_D, [2.5, 97.5])
    return float(gaps_SPN.mean()), float(low), float(high)
