"""The leading terms of many weights at once: a randomised SVD of their rearrangements.

Block Krylov with full orthogonalisation (Musco and Musco, NeurIPS 2015): after J products with R and Rᵀ the terms are
read off the span of R Ω, (R Rᵀ) R Ω, ..., (R Rᵀ)^J R Ω for a random Ω. It needs far fewer passes over R than subspace
iteration where singular values lie close to each other, as those of weights do.

Letters: B weights of one shape, K terms, X = M N rows and Y = P Q columns of a rearranged weight, S columns of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftcli.methods.kpsvd.maths import rearrange
from peftcli.methods.kpsvd.shapes import Split

EXTRA = 8
"""Columns of a block beyond the terms asked for, which speed up the last of them."""
WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Terms:
    """The leading terms of a weight, W = sum_k sigma_k U_k ⊗ V_k.

    Attributes:
        U: Left factors [K, M, N], orthonormal; the entry of largest size in each is positive.
        V: Right factors [K, P, Q], orthonormal.
        sigma: Singular values [K], falling.
        energy: Sum of the squares of all singular values, which is that of the weight's entries.
    """

    U: Tensor
    V: Tensor
    sigma: Tensor
    energy: float

    @property
    def split(self) -> Split:
        """Shapes of the factors."""
        return Split(*self.U.shape[1:], *self.V.shape[1:])


def leading(weights: list[Tensor], split: Split, terms: int, seed: int = 0, iterations: int = 12) -> list[Terms]:
    """The leading terms of weights [O, I] of one shape, in float32 (float64 where they are).

    Args:
        weights: On one device.
        split: Shapes of the factors.
        terms: How many are wanted; fewer come where a weight is a sum of fewer.
        seed: Of the random start; the same for every weight, so that each comes out alike alone and among others.
        iterations: J.
    """
    dtype = weights[0].dtype if weights[0].dtype in WIDE else torch.float32
    R_BXY = torch.stack([rearrange(weight.detach().to(dtype), split) for weight in weights])
    terms = min(terms, split.terms)
    span = (terms + EXTRA) * (iterations + 1)
    exact = span >= split.terms
    U_BXK, sigma_BK, V_BYK = _exact(R_BXY) if exact else krylov(R_BXY, terms + EXTRA, iterations, seed)
    U_BXK, sigma_BK, V_BYK = U_BXK[..., :terms], sigma_BK[..., :terms], V_BYK[..., :terms]
    sign_B1K = _signs(U_BXK)
    U_BKX, V_BKY = (U_BXK * sign_B1K).transpose(1, 2), (V_BYK * sign_B1K).transpose(1, 2)
    energies = R_BXY.double().square().sum((1, 2)).tolist()
    m, n, p, q = split
    return [
        Terms(U_KX.reshape(-1, m, n), V_KY.reshape(-1, p, q), sigma_K, energy)
        for U_KX, V_KY, sigma_K, energy in zip(U_BKX, V_BKY, sigma_BK, energies, strict=True)
    ]


def krylov(R_BXY: Tensor, columns: int, iterations: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Approximate leading singular triples of a batch: U [B, X, S], sigma [B, S] falling, V [B, Y, S]."""
    generator = torch.Generator().manual_seed(seed)
    start_YS = torch.randn(R_BXY.shape[-1], columns, generator=generator, dtype=R_BXY.dtype).to(R_BXY.device)
    block = R_BXY @ start_YS
    left: list[Tensor] = []
    right: list[Tensor] = []
    for _ in range(iterations + 1):
        # Twice is enough to be orthogonal to working precision.
        for _ in range(2):
            for before in left:
                block = block - before @ (before.mT @ block)
        block = torch.linalg.qr(block).Q
        left.append(block)
        right.append(R_BXY.mT @ block)
        block = R_BXY @ right[-1]
    Q_BXD, P_BYD = torch.cat(left, dim=2), torch.cat(right, dim=2)  # R is Q Pᵀ on the span of Q
    squares, vectors = torch.linalg.eigh((P_BYD.mT @ P_BYD).double())
    sigma_BS = squares[:, -columns:].flip(1).clamp_min(0).sqrt()
    mixed_BDS = vectors[:, :, -columns:].flip(2).to(R_BXY.dtype)
    V_BYS = torch.nn.functional.normalize(P_BYD @ mixed_BDS, dim=1)
    return Q_BXD @ mixed_BDS, sigma_BS.to(R_BXY.dtype), V_BYS


def _exact(R_BXY: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U_BXK, sigma_BK, V_BKY = torch.linalg.svd(R_BXY, full_matrices=False)
    return U_BXK, sigma_BK, V_BKY.mT


def _signs(U_BXK: Tensor) -> Tensor:
    """1 or -1 for each term, so that the entry of largest size in its left factor becomes positive."""
    place_B1K = U_BXK.abs().argmax(dim=1, keepdim=True)
    return torch.where(U_BXK.gather(1, place_B1K) < 0, -1.0, 1.0).to(U_BXK.dtype)
