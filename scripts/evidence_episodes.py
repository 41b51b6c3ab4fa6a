"""What an evidence script on few-shot tasks is made of: a meta-trained model, measured task by task on fixed tasks,
whose support may be damaged, and fine-tuned from there.

N rows of a task, C classes. Every arm answers the same tasks with the same damage, so that arms are compared in pairs.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from evidence import DRAWS, Prepared, Result, material_of, prepared

WRONG, NOISE = 0.1, 0.5
"""Share of the support's rows whose labels are wrong; deviation of the noise over that of the pictures."""
CONDITIONS = ("clean", "wrong", "noisy")
JITTER = 4
"""Pixels that a picture of the support is moved by at most while fine-tuning."""
Scores = dict[str, list[float]]
"""Accuracy of each task in order, by domain."""


@contextmanager
def made(recipe: str, overrides: Sequence[str]) -> Iterator[Prepared]:
    """A run up to its first step; pictures are read once for all runs of a process."""
    with prepared(recipe, overrides, lambda config: replace(material_of(config))) as found:
        yield found


def meta_trained(recipe: str, overrides: Sequence[str], place: Path | None = None) -> Result:
    """Meta-train a recipe and measure it on the fixed tasks of validation.

    Args:
        recipe: Of few-shot tasks.
        overrides: Of the recipe.
        place: Where the trained tensors go.

    Returns:
        `validation`: accuracies by domain; `sparsity` of each expert and `union` of all; `notes` of the method;
        `seconds` of training.
    """
    from safetensors.torch import save_file

    from peftcli.training import loop

    with made(recipe, overrides) as found:
        job, began = found.job, time.perf_counter()
        _, names = loop.train(job)
        seconds = time.perf_counter() - began
        job.method.finish(job.model)
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            own = dict(job.model.named_parameters())
            save_file({name: own[name].detach().contiguous() for name in names if name in own}, place)
        return {
            "validation": measured(found, found.material.validation),
            "notes": job.method.notes,
            "seconds": round(seconds, 1),
            **_sparsity(job.model),
        }


def _sparsity(model: Any) -> Result:
    from peftcli.methods.smat import maths

    tuner = getattr(model, "base_model", None)
    if not hasattr(tuner, "masks"):
        return {}
    masks_KM, counts_K = tuner.masks().detach(), tuner.counts()
    return {
        "sparsity": [round(float(share), 5) for share in maths.sparsity(masks_KM, counts_K)],
        "union": round(maths.union_sparsity(masks_KM, counts_K), 5),
    }


@contextmanager
def again(recipe: str, overrides: Sequence[str], place: Path | None) -> Iterator[Prepared]:
    """A run whose training is over, its tensors read from where they were put."""
    import torch
    from safetensors.torch import load_file

    with made(recipe, overrides) as found:
        if place is not None:
            own = dict(found.job.model.named_parameters())
            with torch.no_grad():
                for name, tensor in load_file(place).items():
                    own[name].copy_(tensor)
            found.job.model.requires_grad_(False)
        settings = getattr(found.job.config.method, "router_temperature", None)
        if settings is not None:
            found.job.model.base_model.settings.router_temperature = settings[1]
        yield found


def tested(recipe: str, overrides: Sequence[str], place: Path | None) -> Result:
    """Accuracies of the test's tasks by domain, `clean`; `experts`: their mean weights by domain; `sparsity`."""
    weights: dict[str, list[list[float]]] = defaultdict(list)
    with again(recipe, overrides, place) as found:
        scores = measured(found, found.material.test, experts=weights)
        chosen = {domain: np.mean(rows, 0).round(4).tolist() for domain, rows in weights.items()}
        return {"clean": scores, "experts": chosen, **_sparsity(found.job.model)}


def damaged(recipe: str, overrides: Sequence[str], place: Path | None) -> Result:
    """Accuracies of the test's tasks with wrong labels and with noisy pictures in the support, by condition."""
    with again(recipe, overrides, place) as found:
        return {how: measured(found, found.material.test, how) for how in CONDITIONS[1:]}


def measured(found: Prepared, pool: Any, condition: str = "clean", experts: Any = None) -> Scores:
    """Accuracy of each fixed task, by domain.

    Args:
        found: The run.
        pool: Its split.
        condition: What is done to the support.
        experts: Gets the experts' weights of each task, by domain.
    """
    from peftcli.methods import episodes as few_shot
    from peftcli.tasks.inference import measuring

    job, scores = found.job, defaultdict(list)
    with measuring(job.model, job.accelerator.device, job.precision):
        for index in range(len(pool)):
            domain, episode = task(found, pool, index, condition)
            answer_NC = few_shot.logits(job.model, episode)
            scores[domain].append(_accuracy(answer_NC, episode))
            if experts is not None and getattr(job.model, "experts", None) is not None:
                experts[domain].append(job.model.experts.tolist())
    return dict(scores)


def _accuracy(answer_NC: Any, episode: Any) -> float:
    _, truth_N = episode.part(query=True)
    return round(float((answer_NC.argmax(1) == truth_N).float().mean()), 5)


def task(found: Prepared, pool: Any, index: int, condition: str = "clean") -> tuple[str, Any]:
    """A fixed task and its domain, its support damaged as the condition says."""
    (episode,) = found.job.task.split(found.job.task.collate(pool.take([index]), found.job.feed.tokenizer))
    dice = np.random.default_rng([index, CONDITIONS.index(condition)])
    if condition == "wrong":
        episode = replace(episode, classes_N=exchanged(episode.classes_N, episode.support, dice))
    elif condition == "noisy":
        episode = replace(episode, inputs=noisy(episode.inputs, episode.support, dice))
    return pool.domain_of(index), episode


def exchanged(classes_N: Any, support: int, dice: np.random.Generator) -> Any:
    """Classes of which a tenth of the support's are wrong: rows of different classes exchange theirs, so that each
    class keeps its number of rows; the query stays."""
    found, order = classes_N.clone(), dice.permutation(support).tolist()
    for _ in range(round(WRONG * support / 2)):
        first = order.pop()
        other = next((row for row in order if classes_N[row] != classes_N[first]), None)
        if other is None:
            break
        order.remove(other)
        found[first], found[other] = classes_N[other], classes_N[first]
    return found


def noisy(inputs: Mapping[str, Any], support: int, dice: np.random.Generator) -> dict[str, Any]:
    """Pictures of which the support's have white noise on them."""
    import torch

    pixels = inputs["pixel_values"].clone()
    grain = torch.from_numpy(dice.standard_normal(pixels[:support].shape, dtype=np.float32))
    pixels[:support] += NOISE * pixels[:support].std() * grain
    return {**inputs, "pixel_values": pixels}


def fine_tuned(
    recipe: str, overrides: Sequence[str], place: Path | None, how: str, rates: Sequence[float], steps: int, tasks: int
) -> Result:
    """Fine-tune the merged model of each of the first tasks of each held-out domain.

    The rate is the one with the best accuracy on as many tasks of validation; 0 leaves the merged model.

    Args:
        recipe: As it was meta-trained.
        overrides: As it was meta-trained.
        place: Where the trained tensors are.
        how: `full` or `lora`.
        rates: To choose from.
        steps: Of fine-tuning.
        tasks: Of each domain.

    Returns:
        `rate`, and accuracies of the test's tasks by domain, `direct` and `tuned`.
    """
    with again(recipe, overrides, place) as found:
        validation, test = found.material.validation, found.material.test
        tried = [_tuned(found, validation, how, rate, steps, tasks, validation.domains) for rate in rates]
        best = max(range(len(rates)), key=lambda at: mean_of(tried[at]))
        far = [domain for domain in test.domains if domain in test.held_out]
        direct = _tuned(found, test, how, 0.0, 0, tasks, far)
        tuned = direct if rates[best] == 0 else _tuned(found, test, how, rates[best], steps, tasks, far)
        return {"rate": rates[best], "direct": direct, "tuned": tuned}


def mean_of(scores: Scores) -> float:
    """The mean over domains, each weighing the same."""
    return statistics.mean(statistics.mean(part) for part in scores.values())


def _tuned(found: Prepared, pool: Any, how: str, rate: float, steps: int, tasks: int, domains: Sequence[str]) -> Scores:
    from peftcli.methods import episodes as few_shot
    from peftcli.tasks.inference import measuring

    job, scores = found.job, defaultdict(list)
    chosen = [pool.domains.index(domain) * pool.fixed + at for domain in domains for at in range(tasks)]
    for index in chosen:
        domain, episode = task(found, pool, index)
        model = merged(job, episode)
        if rate and steps:
            model = descended(job, model, found.attached.loaded.family, episode, how, rate, steps, index)
        with measuring(model, job.accelerator.device, job.precision):
            scores[domain].append(_accuracy(few_shot.logits(model, episode), episode))
    return dict(scores)


def merged(job: Any, episode: Any) -> Any:
    """The plain model of a task; the run's stays as it is."""
    own = copy.deepcopy(job.model)
    inputs, classes_N = episode.part(query=False)
    if not hasattr(own, "merge_for"):
        return own
    with job.arithmetic():
        return own.base_model.merge_for(inputs, classes_N, episode.ways)


def descended(job: Any, model: Any, family: Any, episode: Any, how: str, rate: float, steps: int, seed: int) -> Any:
    """The model after steps on the support: moved pictures against prototypes of the unmoved ones.

    LoRA takes ten times the rate, as the released code has it.
    """
    import torch
    import torch.nn.functional as F

    from peftcli.methods import episodes as few_shot
    from peftcli.methods.lora.settings import Settings as Lora
    from peftcli.methods.lora.tuner import Method as LoraMethod

    torch.manual_seed(seed)
    model.requires_grad_(how == "full")
    if how == "lora":
        model, rate = LoraMethod(Lora(r=8, alpha=16, targets=["conv"])).attach(model, family), 10 * rate
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    inputs, classes_N = episode.part(query=False)
    pixels = inputs["pixel_values"]
    for _ in range(steps):
        down, right = torch.randint(-JITTER, JITTER + 1, (2,)).tolist()
        with job.arithmetic():
            both = torch.cat([pixels, pixels.roll((down, right), (2, 3))])
            features_ND = few_shot.wide(model(pixel_values=both).logits)
        means_CD = few_shot.prototypes(features_ND[: len(pixels)], classes_N, episode.ways)
        F.cross_entropy(few_shot.scores(features_ND[len(pixels) :], means_CD), classes_N).backward()
        optimiser.step()
        optimiser.zero_grad()
    return model


def step_times(recipe: str, arms: Sequence[Sequence[str]], steps: int) -> Result:
    """`seconds` of this process's CPU [arms, steps] that a meta-training step of each of two arms takes, on the same
    tasks, by turns in one process."""
    from peftcli.training import optimiser

    with made(recipe, arms[0]) as first, made(recipe, arms[1]) as second:
        both, found = (first, second), ([], [])
        moved = [
            optimiser.build(one.job.config.optim, one.job.model, one.job.method.parameter_groups(one.job.model))
            for one in both
        ]
        for step in range(steps + 1):
            batches = first.job.feed.micro_batches(0, step)
            for one, descent, times in zip(both, moved, found, strict=True):
                began = time.process_time()
                one.job.model.train()
                for batch in batches:
                    with one.job.arithmetic():
                        loss = one.job.task.loss(one.job.model, batch).total / len(batches)
                    loss.backward()
                descent.step()
                one.job.method.after_step(one.job.model, step + 1)
                descent.zero_grad()
                times.append(time.process_time() - began)
        return {"seconds": [times[1:] for times in found]}


def difference(
    ours: Sequence[Scores], theirs: Sequence[Scores], domains: Sequence[str], draws: int = DRAWS
) -> tuple[float, float, float]:
    """Mean difference of two arms' accuracies over domains that weigh the same, with its 95 % interval.

    Both arms have a run for each seed, on the same tasks: a bootstrap sample draws seeds, and tasks of each domain,
    anew, the same for both.
    """
    generator = np.random.default_rng(0)
    seeds = len(ours)
    shares = generator.multinomial(seeds, [1 / seeds] * seeds, size=draws) / seeds
    total, centre = np.zeros(draws), []
    for domain in domains:
        gaps = np.array([np.subtract(a[domain], b[domain]) for a, b in zip(ours, theirs, strict=True)])
        tasks = gaps.shape[1]
        drawn = generator.multinomial(tasks, [1 / tasks] * tasks, size=draws) / tasks
        total += np.einsum("ds,st,dt->d", shares, gaps, drawn, optimize=True) / len(domains)
        centre.append(gaps.mean())
    low, high = np.percentile(total, [2.5, 97.5])
    return float(np.mean(centre)), float(low), float(high)
