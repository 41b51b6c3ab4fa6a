"""The row and the column space of a layer's weight, and the part of them that its inputs use.

A layer y = W x with W [O, I] puts out nothing outside W's column space, and nothing of x outside its row space matters.
With the second moment of the inputs C = E[x xᵀ] = L Lᵀ, E|A x|² = |A L|² for any A, so that the best W' of rank K on
these inputs comes from the singular value decomposition W L = U S Qᵀ by Eckart and Young: W' = U_K U_Kᵀ W. Without C it
is that of W itself. Everything is computed in float64 and comes back in it.

Letters: O outputs, I inputs, K rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NEGLIGIBLE = 1e-12
"""Eigenvalues of a second moment below this share of the first are rounding: there is no such direction."""
EXACT = 1024
"""Smaller sides than this are decomposed whole; of larger ones a few leading directions are sought by themselves."""
FEW = 8
"""Few are less than one in so many."""
EXTRA, ITERATIONS = 16, 8
"""Columns beyond those asked for, and passes, of the randomised decomposition (Halko, Martinsson and Tropp, 2011)."""


@dataclass(frozen=True)
class Factors:
    """A matrix as a product of two, W' = expand reduce.

    Attributes:
        expand: [O, K].
        reduce: [K, I].
    """

    expand: Tensor
    reduce: Tensor

    def product(self) -> Tensor:
        """W' [O, I]."""
        return self.expand @ self.reduce

    def balanced(self) -> Factors:
        """The same product, each column of `expand` as long as its row of `reduce`: steps of like size move both."""
        long_K, wide_K = self.expand.norm(dim=0), self.reduce.norm(dim=1)
        scale_K = torch.where((long_K > 0) & (wide_K > 0), (wide_K / long_K).sqrt(), 1.0)
        return Factors(self.expand * scale_K, self.reduce / scale_K[:, None])


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float64 and out of the graph."""
    return tensor.detach().to(place(tensor.device)).double()


def place(device: torch.device) -> torch.device:
    """Where to compute in float64: on this device, but for Apple's GPUs, which do not know it."""
    return torch.device("cpu") if device.type == "mps" else device


def projector(basis_OK: Tensor) -> Tensor:
    """The orthogonal projector [O, O] onto the span of orthonormal columns."""
    return basis_OK @ basis_OK.mT


def leading(W_OI: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triples: U [O, K], sigma [K] falling, V [I, K]; the largest entry of each U_k is positive.

    Of a large matrix few are found by a randomised method, the same ones at every call.
    """
    W_OI = wide(W_OI)
    side = min(W_OI.shape)
    rank = min(rank, side)
    if _whole(rank, side):
        U_OK, sigma_K, V_KI = torch.linalg.svd(W_OI, full_matrices=False)
        V_IK = V_KI.mT
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            U_OK, sigma_K, V_IK = torch.svd_lowrank(W_OI, rank + EXTRA, ITERATIONS)
    U_OK, sigma_K, V_IK = U_OK[:, :rank], sigma_K[:rank], V_IK[:, :rank]
    sign_K = _signs(U_OK)
    return U_OK * sign_K, sigma_K, V_IK * sign_K


def input_basis(C_II: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The directions that most of the inputs' energy lies in: V [I, K] orthonormal, and their energies [K], falling.

    Source: the input interaction subspace of Garg et al., arXiv 2407.04797, here as eigenvectors of C. Found as in
    `leading`.
    """
    C_II = wide(C_II)
    if not _whole(rank, len(C_II)):
        V_IK, energy_K, _ = leading(C_II, rank)
        return V_IK, energy_K
    energy_I, V_II = torch.linalg.eigh(C_II)
    V_IK = V_II.flip(1)[:, :rank]
    return V_IK * _signs(V_IK), energy_I.flip(0)[:rank].clamp_min(0)


def _whole(rank: int, side: int) -> bool:
    return side <= EXACT or rank * FEW >= side


def _signs(U_OK: Tensor) -> Tensor:
    return torch.where(U_OK.gather(0, U_OK.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)


def output_basis(W_OI: Tensor, C_II: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same of the outputs without bias, whose second moment is W C Wᵀ: U [O, K], and energies [K]."""
    W_OI = wide(W_OI)
    return input_basis(W_OI @ C_II.double() @ W_OI.mT, rank)


def root(C_II: Tensor) -> Tensor:
    """L [I, I] with C = L Lᵀ. A direction that C lacks gets a negligible length, so the weight decides about it."""
    energy_I, Q_II = torch.linalg.eigh(wide(C_II))
    return Q_II * energy_I.clamp_min(NEGLIGIBLE * float(energy_I[-1].clamp_min(0))).sqrt()


def spectrum(W_OI: Tensor, C_II: Tensor | None = None) -> Tensor:
    """Singular values of W L, or of W, falling; their squares are what each direction adds to E|W x|²."""
    return torch.linalg.svdvals(_seen(W_OI, C_II))


def spaces(W_OI: Tensor, C_II: Tensor | None, rank: int) -> tuple[Tensor, list[float], list[float]]:
    """The column space as data sees it, and the energies on both sides.

    Args:
        W_OI: The weight.
        C_II: Second moment of its inputs; None counts every direction alike.
        rank: K.

    Returns:
        U [O, K], the leading directions of W C Wᵀ; the energies of all directions of the outputs, and of the inputs
        (without C those of the row space, which are the same), falling.
    """
    W_OI = wide(W_OI)
    if C_II is None:
        U_OR, sigma, _ = torch.linalg.svd(W_OI, full_matrices=False)
        energies = sigma.square().tolist()
        return U_OR[:, :rank], energies, energies
    if W_OI.shape[0] > W_OI.shape[1]:
        into_I, Q_II = torch.linalg.eigh(wide(C_II))
        into_I = into_I.clamp_min(NEGLIGIBLE * float(into_I[-1].clamp_min(0)))
        U_OR, sigma, _ = torch.linalg.svd(W_OI @ (Q_II * into_I.sqrt()), full_matrices=False)
        return U_OR[:, :rank], sigma.square().tolist(), into_I.flip(0).tolist()
    into_I = torch.linalg.eigvalsh(wide(C_II))
    into_I = into_I.clamp_min(NEGLIGIBLE * float(into_I[-1].clamp_min(0)))
    out_O, U_OO = torch.linalg.eigh(W_OI @ C_II.double() @ W_OI.mT)
    return U_OO.flip(1)[:, :rank], out_O.flip(0).clamp_min(0).tolist(), into_I.flip(0).tolist()


def truncated(W_OI: Tensor, C_II: Tensor | None, rank: int) -> Factors:
    """The matrix of this rank with the least E|(W - W') x|², as U_K and U_Kᵀ W.

    Args:
        W_OI: The weight.
        C_II: Second moment of its inputs; None counts every direction alike.
        rank: K; from min(O, I) on W' is W.
    """
    U_OK = torch.linalg.svd(_seen(W_OI, C_II), full_matrices=False)[0][:, :rank]
    return Factors(U_OK, U_OK.mT @ wide(W_OI))


def error(W_OI: Tensor, other_OI: Tensor, C_II: Tensor | None = None) -> float:
    """The root of E|(W - W') x|², or of |W - W'|² without C."""
    D_OI = wide(W_OI) - wide(other_OI)
    return float(((D_OI if C_II is None else D_OI @ C_II.double()) * D_OI).sum().clamp_min(0).sqrt())


def _seen(W_OI: Tensor, C_II: Tensor | None) -> Tensor:
    W_OI = wide(W_OI)
    return W_OI if C_II is None else W_OI @ root(C_II)


def rank_for(energies: Sequence[float], share: float, whole: float | None = None) -> int:
    """The fewest leading directions with this share of the energy; all of them where together they have less.

    Args:
        energies: Of directions, falling.
        share: Above 0, at most 1.
        whole: The energy that it is a share of, where not that of all these directions.
    """
    wanted = share * (sum(energies) if whole is None else whole)
    held = 0.0
    for kept, energy in enumerate(energies, start=1):
        held += energy
        if held >= wanted * (1 - NEGLIGIBLE):
            return kept
    return len(energies)


def break_even(outputs: int, inputs: int) -> int:
    """The largest rank at which two factors hold fewer numbers than the matrix: K (O + I) < O I; 0 where none does."""
    return max(0, (outputs * inputs - 1) // (outputs + inputs))
