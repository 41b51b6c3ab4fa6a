"""SMAT as pure functions: masks, mixed weights, sparsity and its Lagrangian, distillation.

    alpha = router(support)          theta = theta_pre + sum_m alpha_m z_m delta          zeros of z_m / size >= tau

Sources: the equation and the teacher: Chen et al., ICML 2024 (arXiv 2403.08477), their project page and released code;
hard-concrete masks: Louizos et al., ICLR 2018; proxy constraints with restarts: Gallego-Posada et al., NeurIPS 2022.

Shapes: M experts, K mask entries (n_K of them weights each), N rows, C classes, P the shape of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
"""Temperature of the masks, and the stretch that lets them reach 0 and 1 exactly."""
LIMITS = (math.log(0.01), math.log(100.0))
"""Of the mask's logits: beyond them a mask would hardly come back."""
SHIFT = BETA * math.log(-GAMMA / ZETA)
"""A mask without noise is zero where its logit is at most this."""
TINY = 1e-6


def mask(logits: Tensor, noise: Tensor | None = None) -> Tensor:
    """Hard-concrete masks in [0, 1], the same rule in training and evaluation.

    Args:
        logits: Of any shape.
        noise: Uniform on (0, 1) of that shape; None is without noise (1/2).
    """
    shifted = logits if noise is None else logits + torch.logit(noise)
    return (torch.sigmoid(shifted / BETA) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def expected_density(logits_KM: Tensor, counts_K: Tensor) -> Tensor:
    """Expected share of each expert's weights whose mask is not zero under uniform noise, [M].

    Args:
        logits_KM: The masks' logits.
        counts_K: How many weights each covers.
    """
    share_K = counts_K.to(logits_KM.dtype) / counts_K.sum()
    return (share_K @ torch.sigmoid(logits_KM - SHIFT)).clamp(TINY, 1 - TINY)


def sparsity(masks_KM: Tensor, counts_K: Tensor) -> Tensor:
    """Share of each expert's weights whose mask is exactly zero, [M]; counted in float64, as `pruned` counts them."""
    return (counts_K.double() @ (masks_KM == 0).double() / counts_K.double().sum()).to(masks_KM.dtype)


def union_sparsity(masks_KM: Tensor, counts_K: Tensor) -> float:
    """Share of the weights that no expert changes."""
    return float(counts_K[(masks_KM == 0).all(1)].sum() / counts_K.sum())


def overlap(masks_KM: Tensor, counts_K: Tensor) -> Tensor:
    """How much of what two experts change both do: weights in both over weights in either, [M, M]; 1 of the same."""
    on_KM = (masks_KM != 0).double()
    both_MM = on_KM.T @ (on_KM * counts_K[:, None])
    size_M = both_MM.diagonal()
    either_MM = size_M[:, None] + size_M[None] - both_MM
    return torch.where(either_MM > 0, both_MM / either_MM.clamp_min(1), torch.eye(len(size_M), dtype=torch.double))


def merge(theta: Tensor, delta: Tensor, gate: Tensor) -> Tensor:
    """theta_pre + gate delta, at least in the type of `delta`.

    Args:
        theta: A weight of the base, of shape P.
        delta: Its shared change, P.
        gate: sum_m alpha_m z_m, broadcastable to P.
    """
    return torch.addcmul(theta.to(torch.promote_types(theta.dtype, delta.dtype)), delta, gate.to(delta.dtype))


def mixture(logits_M: Tensor, temperature: float, noise_M: Tensor | None = None) -> Tensor:
    """Weights of the experts: independent sigmoids, normalised to 1; exactly 1 of a single expert.

    Args:
        logits_M: The router's.
        temperature: Above 0.
        noise_M: Uniform on (0, 1), for a relaxed Bernoulli draw in training; None takes the sigmoids.
    """
    if len(logits_M) == 1:
        return torch.ones_like(logits_M)
    shifted_M = logits_M if noise_M is None else logits_M + torch.logit(noise_M)
    chosen_M = torch.sigmoid(shifted_M / temperature)
    return chosen_M / chosen_M.sum().clamp_min(torch.finfo(chosen_M.dtype).tiny)


def primal(multipliers_M: Tensor, density_M: Tensor, target: float) -> Tensor:
    """What lowers the expected density of experts that are too dense: mean lambda (tau - 1 + E[L0]), lambda held."""
    return (multipliers_M.detach() * (target - 1 + density_M)).mean()


def dual(multipliers_M: Tensor, sparsity_M: Tensor, target: float) -> Tensor:
    """What, descended upon, raises lambda while an expert is too dense: mean lambda (sparsity - tau)."""
    return (multipliers_M * (sparsity_M.detach() - target)).mean()


def restarted(multipliers_M: Tensor, sparsity_M: Tensor, target: float) -> Tensor:
    """The multipliers, zero where the expert is sparse enough (dual restarts), and never negative."""
    return torch.where(sparsity_M > target, torch.zeros_like(multipliers_M), multipliers_M.clamp_min(0))


def pruned(logits_KM: Tensor, counts_K: Tensor, target: float) -> Tensor:
    """Logits with each expert's sparsity at the target or above: the lowest ones fall to where the mask is zero.

    Those that are zero already stay as they are; of equal logits the first ones fall first.
    """
    found_KM = logits_KM.clone()
    for expert_K in found_KM.unbind(1):
        order_K = expert_K.argsort(stable=True)
        before_K = counts_K[order_K].double().cumsum(0) - counts_K[order_K]
        fall_K = order_K[before_K < target * counts_K.double().sum()]
        expert_K[fall_K] = expert_K[fall_K].clamp_max(SHIFT - TINY)
    return found_KM


def distance(student_NC: Tensor, teacher_NC: Tensor, temperature: float, reverse: bool) -> Tensor:
    """T^2 KL in nats, a mean over rows; zero where both are equal, and never negative but for rounding.

    Args:
        student_NC: Scores that learn.
        teacher_NC: Scores to learn from, held.
        temperature: T.
        reverse: KL(student || teacher), else KL(teacher || student).
    """
    student = F.log_softmax(student_NC / temperature, 1)
    teacher = F.log_softmax(teacher_NC.detach() / temperature, 1)
    first, second = (teacher, student) if reverse else (student, teacher)
    return temperature**2 * F.kl_div(first, second, reduction="batchmean", log_target=True)


def distillation(student_NC: Tensor, teachers: Sequence[Tensor], temperature: float, reverse: bool) -> Tensor:
    """The mean of the distances to the teachers, a scalar; zero without any."""
    if not teachers:
        return student_NC.new_zeros(())
    return torch.stack([distance(student_NC, one, temperature, reverse) for one in teachers]).mean()
