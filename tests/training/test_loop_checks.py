"""The named checks around the loop: what they catch, what they let pass, and that they leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peftcli.config.errors import CheckFailed
from peftcli.training import checks


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter, and a trained tensor that the forward pass may leave out."""

    def __init__(self, uses_all: bool = True):
        super().__init__()
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.norm.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(2, 4))
        self.B = nn.Parameter(torch.zeros(4, 2))
        self.extra = nn.Parameter(torch.zeros(4))
        self.uses_all = uses_all

    def forward(self, x_BD):
        out_BD = self.norm(self.base(x_BD)) + x_BD @ self.A.T @ self.B.T
        return out_BD + self.extra if self.uses_all else out_BD


BATCH = {"x": torch.randn(5, 4, generator=torch.Generator().manual_seed(0))}


def bits(model: nn.Module) -> dict[str, bytes]:
    return {n: t.numpy().tobytes() for n, t in model.state_dict().items()}


def loss_of(model: nn.Module):
    return lambda batch: model(batch["x"]).square().sum()


def test_every_tensor_learns_although_a_factor_starts_at_zero():
    model = Adapted()
    before = bits(model)
    assert checks.dead_adapter(model, loss_of(model), [BATCH], seed=0) == (3, 1)
    assert bits(model) == before
    assert all(p.grad is None for p in model.parameters())


def test_a_bypassed_tensor_is_named():
    model = Adapted(uses_all=False)
    before = bits(model)
    with pytest.raises(CheckFailed, match=r"dead-adapter: 1 of 3 trained tensors get no gradient: extra"):
        checks.dead_adapter(model, loss_of(model), [BATCH, BATCH], seed=0)
    assert bits(model) == before


def test_a_tensor_that_another_batch_reaches_is_alive():
    model = nn.Embedding(3, 2)
    rows = [{"x": torch.tensor([0])}, {"x": torch.tensor([1])}]
    parts = nn.ParameterList([nn.Parameter(torch.ones(2)) for _ in range(2)])
    model.parts = parts
    assert checks.dead_adapter(
        model, lambda batch: (model(batch["x"]) * parts[int(batch["x"])]).sum(), rows, seed=0
    ) == (3, 2)


def test_nothing_trained_is_dead():
    with pytest.raises(CheckFailed, match="nothing in the model is trained"):
        checks.dead_adapter(nn.Linear(2, 2).requires_grad_(False), lambda b: b, [BATCH], seed=0)


@pytest.mark.parametrize("change", ["base.weight", "norm.running_mean", "norm.num_batches_tracked"])
def test_a_frozen_tensor_or_statistic_that_moves_is_named(change):
    model = Adapted()
    before = checks.fingerprints(model)
    tensor = dict(model.state_dict())[change]
    tensor.view(-1)[0] += 1
    with pytest.raises(CheckFailed, match=f"frozen-moved.*{change}"):
        checks.frozen_moved(before, model, trained={"A", "B", "extra"})


def test_the_smallest_change_of_a_bf16_weight_is_seen():
    model = nn.Linear(3, 3, bias=False).to(torch.bfloat16).requires_grad_(False)
    before = checks.fingerprints(model)
    with torch.no_grad():
        model.weight.view(torch.int16)[1, 1] += 1
    with pytest.raises(CheckFailed, match="frozen-moved"):
        checks.frozen_moved(before, model, trained=set())


def test_two_values_that_change_places_are_seen():
    model = nn.Linear(4, 2, bias=False).requires_grad_(False)
    before = checks.fingerprints(model)
    with torch.no_grad():
        model.weight.copy_(model.weight.flip(0))
    with pytest.raises(CheckFailed, match="frozen-moved"):
        checks.frozen_moved(before, model, trained=set())


def test_what_was_trained_may_move():
    model = Adapted()
    before = checks.fingerprints(model)
    with torch.no_grad():
        model.A += 1
    assert checks.frozen_moved(before, model, trained={"A"}) == len(before)


def test_a_start_that_is_not_the_base_is_named_with_the_share():
    before = torch.randn(1, 3, 7)
    assert checks.identity_start(before, before.clone(), "fp32") == 0
    with pytest.raises(CheckFailed, match="identity-start"):
        checks.identity_start(before, before + 0.1, "fp32")


def test_outputs_that_are_not_numbers_are_not_the_base():
    before = torch.randn(1, 3, 7)
    with pytest.raises(CheckFailed, match="identity-start"):
        checks.identity_start(before, before * float("nan"), "bf16")


@pytest.mark.parametrize(("loss", "norm", "named"), [(float("nan"), 1.0, "loss"), (1.0, float("inf"), "gradient norm")])
def test_numbers_that_are_none_stop_the_run(loss, norm, named):
    with pytest.raises(CheckFailed, match=rf"non-finite-loss: the {named} is (nan|inf) at step 7"):
        checks.finite(loss, norm, 7)


def test_a_gradient_of_zero_is_let_pass_for_a_while():
    assert checks.zero_gradient(0.0, 0, 5) == 1
    assert checks.zero_gradient(1e-30, 48, 5) == 0
    assert checks.zero_gradient(0.0, 48, 6) == 49
    with pytest.raises(CheckFailed, match=r"zero-gradient.*up to step 7"):
        checks.zero_gradient(0.0, 49, 7)
