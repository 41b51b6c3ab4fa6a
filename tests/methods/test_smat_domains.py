"""SMAT against dense meta-tuning and the untouched base on made-up domains: accuracy on domains that nobody trained on.

S seeds, T tasks, C classes, N rows.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from peftcli.config.schema import OptimConfig
from peftcli.methods import episodes
from peftcli.methods.contract import Method
from peftcli.methods.episodes import Episode
from peftcli.methods.full.settings import Settings as Full
from peftcli.methods.full.tuner import Method as FullMethod
from peftcli.methods.smat import maths
from peftcli.methods.smat.settings import Settings as Smat
from peftcli.methods.smat.tuner import Method as SmatMethod
from peftcli.testing import tiny
from peftcli.training import optimiser
from tests.few_shot import headless

SEEDS, STEPS, TASKS = 5, 60, 40
WAYS, SHOTS, QUERIES = 4, 3, 5
SPARSITY = 0.8
METHODS = {
    "dense": (lambda: FullMethod(Full()), (3e-4, 1e-3, 3e-3)),
    "smat": (lambda: SmatMethod(Smat(experts=4, sparsity=SPARSITY, router_lr=1e-3)), (1e-3, 3e-3, 1e-2)),
}
SIDE = tiny.PIXELS


def task(domain: int, seed: int, far: bool = False) -> Episode:
    """Patterns of the classes under backgrounds that say nothing: of one domain, or of two others mixed."""
    grounds = torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(99))
    ground = (grounds[domain] + grounds[(domain + 1) % 4]) / math.sqrt(2) if far else grounds[domain]
    dice = torch.Generator().manual_seed(1000 * seed + 10 * domain + far)
    classes_N = torch.cat([torch.arange(WAYS).repeat_interleave(count) for count in (SHOTS, QUERIES)])
    patterns = torch.randn(WAYS, 3, 4, 4, generator=dice).repeat_interleave(4, 2).repeat_interleave(4, 3)
    shape = (len(classes_N), 3, SIDE, SIDE)
    amount = 2 * torch.randn(len(classes_N), 1, 1, 1, generator=dice)
    pixels = 0.5 * patterns[classes_N] + amount * ground + 0.5 * torch.randn(shape, generator=dice)
    return Episode({"pixel_values": pixels}, classes_N, WAYS * SHOTS, WAYS)


def trained(name: str, rate: float, seed: int) -> tuple[Any, Method]:
    """A model after meta-training on the four domains."""
    base, method = headless("vit", torch.float32), METHODS[name][0]()
    torch.manual_seed(seed)
    model = method.attach(base.model, base.family)
    config = OptimConfig(lr=rate)
    seen = 0
    for stage in method.stages(STEPS):
        if stage.start:
            stage.start(model)
        moved = optimiser.build(config, model, method.parameter_groups(model))
        model.train()
        for step in range(stage.steps):
            optimiser.set_rate(moved, config, step, stage.steps)
            episodes.loss(model, task(seen % 4, 10_000 * (seed + 1) + seen)).backward()
            moved.step()
            seen += 1
            method.after_step(model, seen)
            moved.zero_grad()
    method.finish(model)
    return model.eval(), method


@torch.no_grad()
def accuracies(model: Any, far: bool, first: int = 0) -> torch.Tensor:
    """Of tasks of the domains by turns [T]."""
    found = []
    for number in range(first, first + TASKS):
        one = task(number % 4, number, far)
        found.append((episodes.logits(model, one).argmax(1) == one.part(query=True)[1]).double().mean())
    return torch.stack(found)


def interval(gaps_ST: torch.Tensor) -> tuple[float, float, float]:
    """Mean, and a 95 % interval of it by drawing seeds and tasks anew."""
    dice = torch.Generator().manual_seed(0)
    seeds, tasks = gaps_ST.shape
    means = [
        gaps_ST[torch.randint(seeds, (seeds,), generator=dice)][
            :, torch.randint(tasks, (tasks,), generator=dice)
        ].mean()
        for _ in range(2000)
    ]
    low, high = torch.quantile(torch.stack(means), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return gaps_ST.mean().item(), low, high


@pytest.mark.slow
def test_on_domains_that_nobody_trained_on_it_beats_the_base_and_is_not_behind_dense_meta_tuning(capsys) -> None:
    before_T = accuracies(headless("vit", torch.float32).model.eval(), far=True)
    found = {}
    for name, (_, rates) in METHODS.items():
        validation = {rate: accuracies(trained(name, rate, 0)[0], far=False, first=5000).mean() for rate in rates}
        rate = max(validation, key=lambda one, of=validation: of[one])
        models = [trained(name, rate, seed) for seed in range(SEEDS)]
        found[name] = torch.stack([accuracies(model, far=True) for model, _ in models])
        if name == "smat":
            tuners = [model.base_model for model, _ in models]
            assert all((maths.sparsity(one.masks(), one.counts()) >= SPARSITY).all() for one in tuners)
        with capsys.disabled():
            print(f"\n{name}: rate {rate:g}, {found[name].mean():.3f} on other domains; base {before_T.mean():.3f}")
    over_base, over_dense = interval(found["smat"] - before_T), interval(found["smat"] - found["dense"])
    with capsys.disabled():
        print("SMAT less base {:+.3f} [{:+.3f}, {:+.3f}]".format(*over_base), end="; ")
        print("less dense {:+.3f} [{:+.3f}, {:+.3f}]; {} seeds".format(*over_dense, SEEDS))
    assert over_base[1] > 0
    assert over_dense[2] >= 0
