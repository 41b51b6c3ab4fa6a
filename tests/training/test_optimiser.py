"""The learning rate's course, the groups, and state that survives a checkpoint."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from peftcli.config.schema import OptimConfig
from peftcli.training import optimiser


def course(steps: int, **settings) -> list[float]:
    config = OptimConfig(lr=1.0, **settings)
    return [optimiser.rate(config, step, steps) for step in range(steps)]


def test_warm_up_rises_evenly_and_cosine_falls_to_its_end():
    rates = course(10, warmup_share=0.2, schedule="cosine")
    assert rates[:2] == [0.5, 1.0]
    assert rates[2] == 1.0
    assert rates[6] == pytest.approx(0.5)
    assert all(a >= b for a, b in pairwise(rates[1:]))
    assert 0 < rates[-1] < 0.05


def test_linear_falls_by_equal_steps_to_the_final_share():
    rates = course(5, warmup_share=0.0, schedule="linear", final_share=0.5)
    assert rates == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6])


def test_constant_stays_and_a_warm_up_of_any_share_takes_a_step():
    assert course(4, warmup_share=0.01, schedule="constant") == [1.0] * 4
    assert course(4, warmup_share=0.5, schedule="constant") == [0.5, 1.0, 1.0, 1.0]


def test_only_matrices_decay_and_groups_scale_the_rate():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    groups = [{"names": ["0.weight", "0.bias"], "lr_scale": 1.0}, {"names": ["1.weight", "1.bias"], "lr_scale": 10.0}]
    config = OptimConfig(lr=0.1, weight_decay=0.5, warmup_share=0.0)
    built = optimiser.build(config, model, groups)
    assert sorted((len(g["params"]), g["weight_decay"], g["lr_scale"]) for g in built.param_groups) == [
        (1, 0.0, 1.0), (1, 0.0, 10.0), (1, 0.5, 1.0), (1, 0.5, 10.0),
    ]  # fmt: skip
    assert optimiser.set_rate(built, config, 0, 4) == 0.1
    assert {g["lr"] for g in built.param_groups} == {0.1, 1.0}


def test_state_put_back_continues_with_the_same_bits():
    def fresh():
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        names = {p: n for n, p in model.named_parameters()}
        return model, names, optimiser.build(OptimConfig(lr=0.1), model, [{"names": list(names.values())}])

    def step(model, built):
        model(torch.ones(3, 4)).square().sum().backward()
        built.step()
        built.zero_grad()

    model, names, built = fresh()
    for _ in range(3):
        step(model, built)
    saved = {n: t.clone() for n, t in optimiser.state_tensors(built, names).items()}
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    step(model, built)
    other, other_names, other_built = fresh()
    other.load_state_dict(weights)
    optimiser.load_state(other_built, other_names, saved)
    step(other, other_built)
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(model.bias, other.bias)


def test_groups_by_their_own_optimiser_rate_and_limit():
    model = torch.nn.ModuleDict({name: torch.nn.Linear(3, 2, bias=False) for name in ("a", "b", "c")})
    config = OptimConfig(lr=0.1, schedule="constant", warmup_share=0)
    built = optimiser.build(
        config,
        model,
        [
            {"names": ["a.weight"], "lr_scale": 0.5},
            {"names": ["b.weight"], "lr": 2.0, "optimiser": "sgd", "clip_norm": 1.0},
            {"names": ["c.weight"], "lr": 0.3, "optimiser": "sgd", "clip_norm": None},
        ],
    )
    built.load_state_dict(built.state_dict())  # as Accelerate does: other groups, another state
    optimiser.set_rate(built, config, 0, 1)
    parameters = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    built.step()
    moved = {name: (before[name] - p.detach()).flatten()[0].item() for name, p in parameters.items()}
    assert moved == pytest.approx({"a.weight": 0.05, "b.weight": 2.0, "c.weight": 0.3})
    limits = [limit for _, limit in optimiser.clips(built, parameters.values(), 5.0)]
    assert limits == [5.0, 1.0, None]
    kept = optimiser.state_tensors(built, {p: name for name, p in parameters.items()})
    assert {key for key in kept if "exp_avg" in key} == {"exp_avg/a.weight", "exp_avg_sq/a.weight"}
