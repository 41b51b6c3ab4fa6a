"""Few-shot tasks measured: accuracy and loss of the query by domain, with intervals over tasks. T tasks, M experts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F

from peftcli.data.ahead import ahead
from peftcli.methods import episodes as few_shot
from peftcli.methods.episodes import Episode
from peftcli.tasks.contract import Evaluation
from peftcli.tasks.inference import measuring
from peftcli.tasks.intervals import Z_95

if TYPE_CHECKING:
    from peftcli.tasks.episodes.pool import Pool
    from peftcli.tasks.episodes.task import EpisodesTask

GROUPS = {False: "in_distribution", True: "out_of_distribution"}
"""Domains that were trained on, and others; by whether they are held out."""
NAMED = 8
"""Classes of a task that an example names."""
Ready = Callable[[Any, Episode], Any]
"""From a model and a task to what is measured on it."""


@dataclass(frozen=True)
class Answered:
    """What came of a task.

    Attributes:
        domain: Its domain.
        accuracy: Share of the query rows that are right.
        loss: Mean cross-entropy of the query, in nats.
        right: Query rows that are right.
        rows: Query rows.
        about: The task in words.
        experts: Weight of each expert, where the model has experts; [M].
    """

    domain: str
    accuracy: float
    loss: float
    right: int
    rows: int
    about: str
    experts: list[float] | None = None


def evaluate(
    task: EpisodesTask,
    model: Any,
    pool: Pool,
    tokenizer: Any,
    device: Any,
    precision: str,
    generate: bool,
    ready: Ready = lambda model, episode: model,
) -> Evaluation:
    """Measure a model on a split's fixed tasks, or on the first ones of training.

    Args:
        task: Collates.
        model: Without a wrapper.
        pool: The split.
        tokenizer: The model's.
        device: Where the model is.
        precision: Arithmetic.
        generate: Add the tasks as examples, and the experts that each chose.
        ready: What is measured on a task, made from the model and the task; the model itself if not given.
    """
    found: list[Answered] = []
    with measuring(model, device, precision):
        batches = ahead(lambda row: task.collate([row], tokenizer), pool.take(range(len(pool))), max(1, task.workers))
        for index, batch in enumerate(batches):
            found.append(_answer(task, model, pool, index, {k: v.to(device) for k, v in batch.items()}, ready))
    metrics, intervals = summary(found, pool.held_out)
    if not generate:
        return Evaluation(metrics)
    return Evaluation(metrics, [_example(i, one) for i, one in enumerate(found)], intervals, _experts(found))


def _answer(task: EpisodesTask, model: Any, pool: Pool, index: int, batch: dict[str, Any], ready: Ready) -> Answered:
    domain, drawn = pool.task(index)
    (episode,) = task.split(batch)
    model = ready(model, episode)
    scores_NC = few_shot.logits(model, replace(episode, domain=domain)).float()
    _, truth_N = episode.part(query=True)
    right = int((scores_NC.argmax(1) == truth_N).sum())
    names = pool.names(domain, drawn)
    listed = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
    about = f"{domain}: {len(drawn.support)} support rows of {drawn.ways} classes ({listed})"
    weights_M = getattr(model, "experts", None)
    chosen = None if weights_M is None else [round(float(one), 6) for one in weights_M]
    loss = float(F.cross_entropy(scores_NC, truth_N))
    return Answered(domain, right / len(truth_N), loss, right, len(truth_N), about, chosen)


def summary(found: list[Answered], held_out: frozenset[str]) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Means over the domains, of each group of them and of each, and 95 % intervals of the accuracies.

    Args:
        found: The tasks.
        held_out: Domains that were not trained on.

    Returns:
        `accuracy` and `loss`, means over the domains, each domain weighing the same; `accuracy_in_distribution` and
        `accuracy_out_of_distribution`, where there are both; `accuracy_DOMAIN` of each. Intervals: the mean +- 1.96
        standard errors over tasks, as Meta-Dataset reports them.
    """
    by_domain: dict[str, list[Answered]] = defaultdict(list)
    for one in found:
        by_domain[one.domain].append(one)
    of_each = {domain: _mean([one.accuracy for one in part]) for domain, part in by_domain.items()}
    losses = [sum(one.loss for one in part) / len(part) for part in by_domain.values()]
    named = {"accuracy": list(by_domain)}
    groups = {name: [d for d in by_domain if (d in held_out) == far] for far, name in GROUPS.items()}
    if all(groups.values()):
        named |= {f"accuracy_{name}": part for name, part in groups.items()}
    named |= {f"accuracy_{domain}": [domain] for domain in by_domain}
    metrics, intervals = {}, {}
    for name, domains in named.items():
        centre = sum(of_each[d][0] for d in domains) / len(domains)
        half = Z_95 * math.sqrt(sum(of_each[d][1] ** 2 for d in domains)) / len(domains)
        metrics[name], intervals[name] = centre, (max(0.0, centre - half), min(1.0, centre + half))
    metrics["loss"] = sum(losses) / len(losses)
    return metrics, intervals


def _mean(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    n = len(values)
    mean = sum(values) / n
    spread = sum((value - mean) ** 2 for value in values) / max(1, n - 1)
    return mean, math.sqrt(spread / n)


def _example(index: int, one: Answered) -> dict[str, Any]:
    return {
        "row": index,
        "input": one.about,
        "expected": f"{one.rows} right",
        "predicted": f"{one.right} right",
        "correct": None,
        "score": one.accuracy,
    }


def _experts(found: list[Answered]) -> dict[str, Any]:
    """Each task's experts, by domain."""
    tasks: dict[str, list[list[float]]] = defaultdict(list)
    for one in found:
        if one.experts is not None:
            tasks[one.domain].append(one.experts)
    return {"experts": dict(tasks)} if tasks else {}
