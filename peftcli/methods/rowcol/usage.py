"""How much of its row and column space each layer uses on real inputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from peftcli.methods.rowcol.maths import rank_for, wide

EPS = 1e-2
"""Share of the energy that may lie outside of the used space."""


@dataclass(frozen=True)
class Usage:
    """A layer's used dimensions, by the energy of its inputs and outputs.

    Attributes:
        inputs: I.
        outputs: O.
        row_rank: Directions of the row space that hold the inputs' energy, k_S.
        column_rank: Directions of the column space that hold the outputs', k_T.
    """

    inputs: int
    outputs: int
    row_rank: int
    column_rank: int

    @property
    def rank(self) -> int:
        """The utilised rank min(k_S, k_T) of Garg et al., arXiv 2407.04797."""
        return min(self.row_rank, self.column_rank)

    @property
    def row(self) -> float:
        """k_S / I."""
        return self.row_rank / self.inputs

    @property
    def column(self) -> float:
        """k_T / O."""
        return self.column_rank / self.outputs

    @property
    def both(self) -> float:
        """The utilised rank as a share of the largest there could be."""
        return self.rank / min(self.inputs, self.outputs)


def measure(W_OI: Tensor, C_II: Tensor, eps: float = EPS) -> Usage:
    """The used dimensions of a layer.

    Args:
        W_OI: Its weight.
        C_II: Second moment of its inputs.
        eps: Share of the energy that may lie outside.
    """
    W_OI, C_II = wide(W_OI), wide(C_II)
    row, column = (
        rank_for(torch.linalg.eigvalsh(M).flip(0).clamp_min(0).tolist(), 1 - eps) for M in (C_II, W_OI @ C_II @ W_OI.mT)
    )
    return Usage(W_OI.shape[1], W_OI.shape[0], row, column)


def mean_layer_utilisation(found: Iterable[Usage]) -> float:
    """The mean of `Usage.both` over layers (MLU of Garg et al.)."""
    shares = [usage.both for usage in found]
    return sum(shares) / len(shares)
