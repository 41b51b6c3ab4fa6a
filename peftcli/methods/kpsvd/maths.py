"""Sums of Kronecker products as tensors, without a loop over their entries.

A weight W [O, I] with O = M P and I = N Q is rearranged to R(W) [M N, P Q], in which a Kronecker product is an outer
product: R(U ⊗ V) = vec(U) vec(V)ᵀ, row by row (Van Loan and Pitsianis, 1993). An ordinary SVD of R(W) thus gives
W = sum_k s_k U_k ⊗ V_k with orthonormal factors, and its leading terms are the best approximation of their number.

Letters: K terms, T tokens (rows of input), U [K, M, N] and V [K, P, Q] the factors of K terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftcli.methods.kpsvd.shapes import Split

LARGE = 2**20
"""Entries of a weight from which it no longer fits a core's cache."""


def rearrange(W_OI: Tensor, split: Split) -> Tensor:
    """R(W) [..., M N, P Q] of a weight [..., O, I]; a permutation of its entries."""
    m, n, p, q = split
    return W_OI.unflatten(-1, (n, q)).unflatten(-3, (m, p)).transpose(-3, -2).flatten(-4, -3).flatten(-2)


def restore(R_XY: Tensor, split: Split) -> Tensor:
    """The weight [..., O, I] of R(W) [..., M N, P Q]."""
    m, n, p, q = split
    return R_XY.unflatten(-1, (p, q)).unflatten(-3, (m, n)).transpose(-3, -2).flatten(-4, -3).flatten(-2)


def total(U_KMN: Tensor, V_KPQ: Tensor) -> Tensor:
    """sum_k U_k ⊗ V_k [O, I], by one multiplication and one addition an entry and term.

    Both are rounded on their own, as IEEE 754 says, so that every machine and number of threads gives the same bits.
    """
    split = split_of(U_KMN, V_KPQ)
    sum_MPNQ = U_KMN.new_zeros(split.m, split.p, split.n, split.q)
    for U_MN, V_PQ in zip(U_KMN, V_KPQ, strict=True):
        sum_MPNQ += U_MN[:, None, :, None] * V_PQ[None, :, None, :]
    return sum_MPNQ.reshape(split.rows, split.columns)


def change(U_KMN: Tensor, V_KPQ: Tensor, U0_KMN: Tensor, V0_KPQ: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of 2 K terms whose sum is sum_k U_k ⊗ V_k - U0_k ⊗ V0_k.

    (U - U0) ⊗ V + U0 ⊗ (V - V0) is exactly zero at the start, and loses no digits where the change is small.
    """
    return torch.cat([U_KMN - U0_KMN, U0_KMN]), torch.cat([V_KPQ, V_KPQ - V0_KPQ])


def add(W_OI: Tensor | None, U_KMN: Tensor, V_KPQ: Tensor, dtype: torch.dtype) -> Tensor:
    """W + sum_k U_k ⊗ V_k [O, I] at the speed of a small batched matrix product, in `dtype`; without W the sum alone.

    Each [N, Q] block of the result is a product of K columns and K rows.
    """
    m, n, p, q = split_of(U_KMN, V_KPQ)
    wide = dtype if W_OI is None else torch.promote_types(W_OI.dtype, dtype)
    left_BNK = U_KMN.to(wide).permute(1, 2, 0)[:, None].expand(m, p, n, -1).reshape(m * p, n, -1)
    right_BKQ = V_KPQ.to(wide).transpose(0, 1).expand(m, p, -1, q).reshape(m * p, -1, q)
    if W_OI is None:
        return torch.bmm(left_BNK, right_BKQ).view(m * p, n * q)
    W_BNQ = W_OI.to(wide).reshape(m * p, n, q)
    return torch.baddbmm(W_BNQ, left_BNK, right_BKQ).view(m * p, n * q).to(dtype)


def apply(x_TI: Tensor, U_KMN: Tensor, V_KPQ: Tensor, left_first: bool | None = None) -> Tensor:
    """x (sum_k U_k ⊗ V_k)ᵀ [T, O] through the factors: Y = sum_k U_k X V_kᵀ with X = mat(x) [N, Q], Y = mat(y) [M, P].

    Args:
        x_TI: Inputs.
        U_KMN: Left factors, of the inputs' type.
        V_KPQ: Right factors, of the inputs' type.
        left_first: U X before V; None takes the cheaper order.
    """
    m, n, p, q = split_of(U_KMN, V_KPQ)
    rows, terms = len(x_TI), len(U_KMN)
    if left_first is None:
        left_first = m * q * (n + p) <= n * p * (q + m)
    if rows * terms * max(m * q, n * p) > LARGE:
        return _apply_one_by_one(x_TI, U_KMN, V_KPQ, left_first)
    # Products of two or three dimensions alone: `matmul` copies where an input requires a gradient.
    if left_first:
        z_TCQ = torch.bmm(U_KMN.reshape(1, terms * m, n).expand(rows, -1, -1), x_TI.reshape(rows, n, q))
        z_BC = z_TCQ.view(rows, terms, m, q).transpose(1, 2).reshape(rows * m, terms * q)
        return (z_BC @ V_KPQ.transpose(1, 2).reshape(terms * q, p)).view(rows, m * p)
    z_TNKP = (x_TI.reshape(rows * n, q) @ V_KPQ.permute(2, 0, 1).reshape(q, terms * p)).view(rows, n, terms, p)
    z_TCP = z_TNKP.transpose(1, 2).reshape(rows, terms * n, p)
    U_MC = U_KMN.transpose(0, 1).reshape(1, m, terms * n)
    return torch.bmm(U_MC.expand(rows, -1, -1), z_TCP).view(rows, m * p)


def _apply_one_by_one(x_TI: Tensor, U_KMN: Tensor, V_KPQ: Tensor, left_first: bool) -> Tensor:
    """`apply` with a pair of matrix products a term, whose results stay small and are used at once."""
    (m, n, p, q), rows = split_of(U_KMN, V_KPQ), len(x_TI)
    y = x_TI.new_zeros(m * rows, p) if left_first else x_TI.new_zeros(m, rows * p)
    x_ND = _rows_inside(x_TI, n)
    for U_MN, V_PQ in zip(U_KMN, V_KPQ, strict=True):
        if left_first:
            y.addmm_((U_MN @ x_ND).reshape(m * rows, q), V_PQ.T)
        else:
            y.addmm_(U_MN, (x_ND.reshape(n * rows, q) @ V_PQ.T).reshape(n, rows * p))
    return y.view(m, rows, p).transpose(0, 1).reshape(rows, m * p)


def _rows_inside(x_TI: Tensor, outer: int) -> Tensor:
    """[T, outer, inner] as [outer, T inner]."""
    return x_TI.reshape(len(x_TI), outer, -1).transpose(0, 1).reshape(outer, -1)


def apply_transposed(y_TO: Tensor, U_KMN: Tensor, V_KPQ: Tensor) -> Tensor:
    """y (sum_k U_k ⊗ V_k) [T, I] through the factors; (U ⊗ V)ᵀ = Uᵀ ⊗ Vᵀ."""
    return apply(y_TO, U_KMN.transpose(1, 2), V_KPQ.transpose(1, 2))


def gradients(G_OI: Tensor, U_KMN: Tensor, V_KPQ: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the factors where G is that of the sum: vec(dU_k) = R(G) vec(V_k), vec(dV_k) = R(G)ᵀ vec(U_k)."""
    split = split_of(U_KMN, V_KPQ)
    (m, n, p, q), terms = split, len(U_KMN)
    if G_OI.numel() <= LARGE:
        R_XY = rearrange(G_OI, split)
        dU_XK, dV_KY = R_XY @ V_KPQ.reshape(terms, -1).T, U_KMN.reshape(terms, -1) @ R_XY
        return dU_XK.T.reshape(terms, m, n), dV_KY.view(terms, p, q)
    # Block by block, since writing R(G) down takes longer than the products.
    G_BNQ = G_OI.reshape(m * p, n, q)
    right_BQK = V_KPQ.permute(1, 2, 0).expand(m, p, q, -1).reshape(m * p, q, -1)
    left_BKN = U_KMN.transpose(0, 1)[:, None].expand(m, p, -1, n).reshape(m * p, -1, n)
    dU_MNK = torch.bmm(G_BNQ, right_BQK).view(m, p, n, -1).sum(1)
    dV_PKQ = torch.bmm(left_BKN, G_BNQ).view(m, p, -1, q).sum(0)
    return dU_MNK.permute(2, 0, 1), dV_PKQ.transpose(0, 1)


def gradients_through_factors(x_TI: Tensor, g_TO: Tensor, U_KMN: Tensor, V_KPQ: Tensor) -> tuple[Tensor, Tensor]:
    """As `gradients` with G = gᵀ x, which is never formed.

    Args:
        x_TI: Inputs of the layer.
        g_TO: Gradient of its outputs.
        U_KMN: Left factors, of the inputs' type.
        V_KPQ: Right factors, of the inputs' type.
    """
    (m, n, p, q), rows = split_of(U_KMN, V_KPQ), len(x_TI)
    x_ND, g_BP = _rows_inside(x_TI, n), _rows_inside(g_TO, m).reshape(m * rows, p)
    dU_KMN, dV_KPQ = torch.empty_like(U_KMN), torch.empty_like(V_KPQ)
    for k, (U_MN, V_PQ) in enumerate(zip(U_KMN, V_KPQ, strict=True)):
        dU_KMN[k] = (g_BP @ V_PQ).reshape(m, rows * q) @ x_ND.T
        dV_KPQ[k] = g_BP.T @ (U_MN @ x_ND).reshape(m * rows, q)
    return dU_KMN, dV_KPQ


def split_of(U_KMN: Tensor, V_KPQ: Tensor) -> Split:
    """The split that factors have."""
    return Split(*U_KMN.shape[1:], *V_KPQ.shape[1:])
