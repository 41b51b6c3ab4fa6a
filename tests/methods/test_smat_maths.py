"""SMAT's functions in float64: masks, mixed weights, the Lagrangian, distillation, the head."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from peftcli.methods import episodes
from peftcli.methods.smat import masks, maths
from peftcli.methods.smat.router import Router

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_merged_weights_are_the_equation_and_linear_in_the_experts() -> None:
    theta, delta, z_MP = normal(5, 7), normal(5, 7, seed=1), uniform(3, 5, 7)
    alpha_M = F.softmax(normal(3, seed=2), 0)
    merged = maths.merge(theta, delta, torch.einsum("m,mij->ij", alpha_M, z_MP))
    by_hand = theta + sum(alpha_M[m] * z_MP[m] * delta for m in range(3))
    torch.testing.assert_close(merged, by_hand, rtol=0, atol=1e-12)
    other_M = F.softmax(normal(3, seed=3), 0)
    halves = [maths.merge(theta, delta, torch.einsum("m,mij->ij", w, z_MP)) for w in (alpha_M, other_M)]
    both = maths.merge(theta, delta, torch.einsum("m,mij->ij", (alpha_M + other_M) / 2, z_MP))
    torch.testing.assert_close(both, sum(halves) / 2, rtol=0, atol=1e-12)


def test_no_change_is_the_base_bit_for_bit_for_any_experts() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        theta = normal(4, 6).to(dtype)
        merged = maths.merge(theta, torch.zeros(4, 6), uniform(1, 6, seed=4).float())
        assert torch.equal(merged.to(dtype), theta)


@given(st.lists(st.floats(-8, 8), min_size=1, max_size=9), st.floats(0.2, 8))
@settings(deadline=None)
def test_weights_of_experts_are_not_negative_and_add_up_to_one(logits, temperature) -> None:
    for noise in (None, uniform(len(logits)).clamp(1e-3, 1 - 1e-3)):
        alpha_M = maths.mixture(torch.tensor(logits, dtype=F64), temperature, noise)
        assert (alpha_M >= 0).all()
        assert float(alpha_M.sum()) == pytest.approx(1, abs=1e-12)
        if len(logits) == 1:
            assert alpha_M.tolist() == [1.0]


def test_masks_reach_zero_and_one_and_are_zero_where_the_threshold_says() -> None:
    logits = torch.linspace(*maths.LIMITS, 2001, dtype=F64)
    z = maths.mask(logits)
    assert z.min() == 0
    assert z.max() == 1
    assert ((z > 0) & (z < 1)).any()
    assert torch.equal(z == 0, logits <= maths.SHIFT)
    assert pytest.approx(-1.599, abs=1e-3) == maths.SHIFT


def test_probability_of_a_mask_that_is_not_zero_is_the_closed_form() -> None:
    draws = 200_000
    for log_a in (-2.0, -0.5, 0.0, 1.0):
        z = maths.mask(torch.full((draws,), log_a, dtype=F64), uniform(draws, seed=7))
        expected = torch.sigmoid(torch.tensor(log_a - maths.BETA * math.log(-maths.GAMMA / maths.ZETA))).item()
        assert float((z != 0).double().mean()) == pytest.approx(expected, abs=5 * 0.5 / math.sqrt(draws))
        counts, logits = torch.ones(3, dtype=F64), torch.full((3, 2), log_a, dtype=F64)
        assert maths.expected_density(logits, counts).tolist() == pytest.approx([expected] * 2)


def test_expected_density_is_a_share_and_its_gradient_that_of_finite_differences() -> None:
    counts = torch.tensor([1.0, 5, 2, 30, 7, 1], dtype=F64)
    logits = normal(6, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: maths.expected_density(x, counts), logits)
    for extreme in (-60.0, 60.0):
        density = maths.expected_density(torch.full((6, 3), extreme, dtype=F64), counts)
        assert ((density >= 0) & (density <= 1)).all()


def test_sparsity_counts_weights_and_not_entries() -> None:
    z = torch.tensor([[0.0, 0.5], [1.0, 0.0], [0.0, 0.0]], dtype=F64)
    counts = torch.tensor([10.0, 20.0, 70.0], dtype=F64)
    assert maths.sparsity(z, counts).tolist() == pytest.approx([0.8, 0.9])
    assert maths.union_sparsity(z, counts) == pytest.approx(0.7)
    assert maths.overlap(z, counts).tolist() == [[1.0, 0.0], [0.0, 1.0]]


@given(st.integers(1, 40), st.floats(0, 0.99), st.integers(0, 1000))
@settings(deadline=None)
def test_pruning_reaches_the_target_and_goes_hardly_beyond(entries, target, seed) -> None:
    counts = (uniform(entries, seed=seed) * 20).ceil()
    logits = normal(entries, 3, seed=seed + 1)
    found = maths.pruned(logits, counts, target)
    zeros = maths.sparsity(maths.mask(found), counts)
    was = maths.sparsity(maths.mask(logits), counts)
    assert (zeros >= target - 1e-12).all()
    assert (zeros <= torch.maximum(was, target + counts.max() / counts.sum()) + 1e-12).all()
    kept = maths.mask(found) != 0
    assert torch.equal(found[kept], logits[kept])


def test_a_multiplier_rises_while_too_dense_and_starts_anew_once_sparse() -> None:
    lam = torch.zeros(2, dtype=F64, requires_grad=True)
    maths.dual(lam, torch.tensor([0.2, 0.95], dtype=F64), 0.9).backward()
    assert (lam - lam.grad).tolist() == pytest.approx([0.35, -0.025])
    restarted = maths.restarted(torch.tensor([0.3, 0.3]), torch.tensor([0.89, 0.91]), 0.9)
    assert restarted.tolist() == pytest.approx([0.3, 0.0])
    density = torch.tensor([0.8, 0.05], dtype=F64, requires_grad=True)
    maths.primal(lam.detach() + 1, density, 0.9).backward()
    assert density.grad.tolist() == [0.5, 0.5]


def test_on_a_toy_problem_every_expert_becomes_sparse_and_stays() -> None:
    entries, experts, target, steps = 400, 4, 0.9, 600
    counts = torch.full((entries,), 3.0, dtype=F64)
    logits = (0.5 * normal(entries, experts)).requires_grad_()
    lam = torch.zeros(experts, dtype=F64, requires_grad=True)
    wanted = normal(entries, seed=5).abs()  # what the loss wants to keep
    optimiser = torch.optim.SGD(
        [{"params": [logits], "lr": 70 * experts / steps * entries}, {"params": [lam], "lr": 3.1 * experts / steps}]
    )
    path = []
    for step in range(steps):
        alpha = maths.mixture(normal(experts, seed=step), 2.0)
        z = maths.mask(logits)
        spread = maths.sparsity(z.detach(), counts)
        loss = -1e-3 * (wanted * (z @ alpha)).mean() + maths.dual(lam, spread, target)
        loss = loss + maths.primal(lam, maths.expected_density(logits, counts), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            logits.clamp_(*maths.LIMITS)
            lam.copy_(maths.restarted(lam, maths.sparsity(maths.mask(logits), counts), target))
        path.append(maths.sparsity(maths.mask(logits.detach()), counts))
    assert (path[-1] >= target - 0.01).all()
    reached = next(i for i, row in enumerate(path) if (row >= target - 0.01).all())
    assert reached < 0.6 * steps
    assert all((row >= target - 0.01).all() for row in path[reached:])


@pytest.mark.parametrize("reverse", [True, False])
def test_distillation_is_a_divergence_and_holds_the_teacher(reverse) -> None:
    student, teacher = normal(6, 4).requires_grad_(), normal(6, 4, seed=1).requires_grad_()
    assert float(maths.distance(student, student.clone(), 2.0, reverse)) == pytest.approx(0, abs=1e-12)
    found = maths.distance(student, teacher, 2.0, reverse)
    assert found > 0
    found.backward()
    assert teacher.grad is None
    p, q = (F.softmax(x.detach() / 2, 1) for x in ((student, teacher) if reverse else (teacher, student)))
    assert found.item() == pytest.approx(4 * (p * (p / q).log()).sum(1).mean().item())
    several = maths.distillation(student, [teacher, student.detach()], 2.0, reverse)
    assert several.item() == pytest.approx(found.item() / 2)
    assert maths.distillation(student, [], 2.0, reverse).item() == 0


def test_the_router_sees_neither_the_order_of_classes_nor_their_lengths() -> None:
    torch.manual_seed(0)
    router = Router(12, 5).double()
    means = normal(6, 12)
    logits = router(means)
    assert logits.shape == (5,)
    torch.testing.assert_close(router(means[torch.randperm(6)]), logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(router(means * 7), logits, rtol=0, atol=1e-12)
    assert (router(normal(6, 12, seed=3)) - logits).abs().max() > 1e-3


def test_prototypes_are_means_and_scores_cosines() -> None:
    features, classes = normal(7, 5), torch.tensor([2, 0, 0, 1, 2, 2, 1])
    means = episodes.prototypes(features, classes, 3)
    for c in range(3):
        torch.testing.assert_close(means[c], features[classes == c].mean(0), rtol=0, atol=1e-12)
    found = episodes.scores(features, means)
    by_hand = 10 * features[3] @ means[1] / (features[3].norm() * means[1].norm())
    assert found[3, 1].item() == pytest.approx(by_hand.item())


def test_a_structured_layout_has_an_entry_for_each_input_channel_and_number() -> None:
    shapes = {"fc.weight": (4, 6), "fc.bias": (4,), "conv.weight": (8, 3, 2, 2), "place": (1, 5, 7)}
    found = masks.layout(shapes, {"conv.weight"}, structured=True)
    assert found.masks == {"fc.weight": (1, 6), "fc.bias": (4,), "conv.weight": (8, 1, 1, 1), "place": (1, 1, 7)}
    counts = found.counts()
    assert len(counts) == found.entries == 25
    assert float(counts.sum()) == sum(math.prod(shape) for shape in shapes.values())
    gates = found.gates(torch.arange(25.0))
    assert gates["conv.weight"].flatten().tolist() == list(range(10, 18))
    assert masks.layout(shapes, (), structured=False).masks == shapes


def test_sparsity_after_pruning_is_never_short_by_rounding() -> None:
    counts = torch.tensor([float(147 + 128 * (i % 9)) for i in range(6000)])
    logits = torch.full((6000, 2), 1.0) + 0.001 * torch.arange(6000)[:, None]
    found = maths.mask(maths.pruned(logits, counts, 0.9))
    exact = counts.double()[(found == 0)[:, 0]].sum() / counts.double().sum()
    assert exact >= 0.9
    assert maths.sparsity(found, counts)[0].item() == pytest.approx(exact.item(), abs=1e-7)
