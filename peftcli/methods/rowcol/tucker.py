"""Tucker-2 of a convolution as its inputs see it: 1x1 to P channels, the window from P to Q, 1x1 to all.

A kernel W [O, I, H, V] and the second moment C of its patches. Which input channels matter is judged by C summed over
the window's places, M = L Lᵀ [I, I]: the leading directions of W L give R [P, I], what the first convolution computes.
Given R, the best kernel over its outputs is the least-squares one, W_R = W C R̂ᵀ (R̂ C R̂ᵀ)⁻¹ with R̂ the same R at each
place of the window, and the best Q directions of the outputs are the leading ones of W_R (R̂ C R̂ᵀ) W_Rᵀ. With the
channels of R in order, one Cholesky decomposition of R̂ C R̂ᵀ serves every P: its leading block is that of the first P
channels.

Letters: O output channels, I input channels, H and V height and width of the window, P and Q inner channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftcli.methods.rowcol import maths

GRID = 8
"""So many numbers of inner channels are tried on either side."""
RIDGE = 1e-9
"""Share of the mean energy that is added to each direction, so that those that the data lacks do no harm."""


def kept(W_OIHV: Tensor, C: Tensor | None) -> list[tuple[tuple[int, int], float]]:
    """Inner channels (P, Q) and the share of the outputs' energy that they keep, for a grid of both.

    Args:
        W_OIHV: The kernel.
        C: Second moment of its patches [I H V, I H V]; None counts all alike.
    """
    outputs, inputs, *window = W_OIHV.shape
    seen = _seen(W_OIHV, C)
    found = []
    for P in _grid(inputs):
        rows = P * window[0] * window[1]
        energies = torch.linalg.eigvalsh(seen.gram(rows)).flip(0).clamp_min(0)
        held = (energies.cumsum(0) / max(seen.whole, torch.finfo(torch.float64).tiny)).tolist()
        found += [((P, Q), held[Q - 1]) for Q in _grid(outputs) if rows >= Q]
    return found


def kernels(W_OIHV: Tensor, C: Tensor | None, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """The three kernels [P, I, 1, 1], [Q, P, H, V] and [O, Q, 1, 1], in float64.

    Args:
        W_OIHV: The kernel.
        C: Second moment of its patches.
        inputs: P.
        outputs: Q.
    """
    height, width = W_OIHV.shape[2:]
    rows = inputs * height * width
    seen = _seen(W_OIHV, C)
    _, U_OO = torch.linalg.eigh(seen.gram(rows))
    U_OQ = U_OO.flip(1)[:, :outputs]
    best = torch.linalg.solve_triangular(seen.triangle[:rows, :rows].mT, seen.solved[:rows], upper=True)
    core_QPHV = (U_OQ.mT @ best.mT).view(outputs, inputs, height, width)
    return seen.first[:inputs, :, None, None], core_QPHV, U_OQ[:, :, None, None]


@dataclass(frozen=True)
class _Seen:
    """A kernel through its inputs.

    Attributes:
        first: R of all channels [I, I], in order.
        triangle: The Cholesky factor of R̂ C R̂ᵀ [I H V, I H V].
        solved: It, inverted, times R̂ C Wᵀ [I H V, O].
        whole: The outputs' energy.
    """

    first: Tensor
    triangle: Tensor
    solved: Tensor
    whole: float

    def gram(self, rows: int) -> Tensor:
        """Second moment of the outputs [O, O] with so many of the first rows."""
        return self.solved[:rows].mT @ self.solved[:rows]


def _seen(W_OIHV: Tensor, C: Tensor | None) -> _Seen:
    W_OIHV = maths.wide(W_OIHV)
    inputs, window = W_OIHV.shape[1], W_OIHV.shape[2:].numel()
    W_OD = W_OIHV.flatten(1)
    C_DD = torch.eye(inputs * window, dtype=torch.float64, device=W_OD.device) if C is None else C.double()
    M_II = C_DD.view(inputs, window, inputs, window).diagonal(dim1=1, dim2=3).sum(-1)
    R_II = _first(W_OIHV.transpose(0, 1).flatten(1), M_II)
    moment_DD = _by_channel(R_II, _by_channel(R_II, C_DD, window).mT, window)
    ridge = RIDGE * float(moment_DD.diagonal().mean())
    moment_DD.diagonal().add_(max(ridge, torch.finfo(torch.float64).tiny))
    triangle = torch.linalg.cholesky(moment_DD)
    CW_DO = C_DD @ W_OD.mT
    solved = torch.linalg.solve_triangular(triangle, _by_channel(R_II, CW_DO, window), upper=False)
    return _Seen(R_II, triangle, solved, float((W_OD * CW_DO.mT).sum()))


def _first(W_IN: Tensor, M_II: Tensor) -> Tensor:
    """R [I, I]: with W L = A S Bᵀ over input channels (L Lᵀ = M), the rows of B'W that A's directions are read from.

    Of unit energy each; where W has fewer directions than channels, the rest is filled with orthogonal ones.
    """
    L_II = maths.root(M_II)
    U_II, _, _ = torch.linalg.svd(L_II.mT @ W_IN, full_matrices=True)
    # A direction u of the seen channels is read off x by uᵀ L⁻¹.
    return torch.linalg.solve(L_II.mT, U_II).mT


def _by_channel(R_II: Tensor, T_DN: Tensor, window: int) -> Tensor:
    """R̂ T: R over the channels of [I H V, N], at each place of the window."""
    inputs = len(R_II)
    return (R_II @ T_DN.reshape(inputs, -1)).view(inputs * window, -1)


def _grid(side: int) -> list[int]:
    """Evenly spaced numbers of channels below the side."""
    return sorted({max(1, side * place // GRID) for place in range(1, GRID)} | {max(1, side // (2 * GRID))})
