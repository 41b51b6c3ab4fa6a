"""One matrix in place of two: W on the way in and Wᵀ on the way out (Koyun and Toreyin, arXiv 2401.16438).

From a pretrained pair, up [H, D] and down [D, H], the matrix W [H, D] with the least |W - up|² + |W - downᵀ|² is their
mean. A ReLU between them lets a unit's row of `up` be multiplied by c > 0 and its column of `down` be divided by it;
equal lengths come nearest to each other. A diagonal s [H], y = Wᵀ (s f(W x + b)), costs H numbers and gives units their
sign back.

Letters: H hidden units, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftcli.methods.rowcol import maths

SMALLEST = 1e-6
"""Share of a unit's row that W holds at least where a diagonal makes up for the rest."""


def tie(up_HD: Tensor, down_DH: Tensor) -> Tensor:
    """The mean of `up` and `downᵀ` [H, D], in float64."""
    return (maths.wide(up_HD) + maths.wide(down_DH).mT) / 2


def tie_error(up_HD: Tensor, down_DH: Tensor) -> float:
    """|up - downᵀ| / sqrt(|up|² + |down|²): 0 where they are tied already, 1 where they have nothing in common."""
    up_HD, down_HD = maths.wide(up_HD), maths.wide(down_DH).mT
    size = (up_HD.square().sum() + down_HD.square().sum()).sqrt()
    return float((up_HD - down_HD).norm() / size) if size else 0.0


def balance(up_HD: Tensor, down_DH: Tensor) -> Tensor:
    """c [H] that makes c up and down / c equally long in each unit; 1 where one of them is zero."""
    long_H, wide_H = maths.wide(up_HD).norm(dim=1), maths.wide(down_DH).norm(dim=0)
    return torch.where((long_H > 0) & (wide_H > 0), (wide_H / long_H).sqrt(), 1.0)


def with_diagonal(up_HD: Tensor, down_DH: Tensor) -> tuple[Tensor, Tensor]:
    """W [H, D] and s [H] with the least |W - up|² + |s W - downᵀ|².

    Unit by unit the pair of rows is to be (1, s) times one row: the leading singular vector of two rows.
    """
    rows_H2D = torch.stack([maths.wide(up_HD), maths.wide(down_DH).mT], dim=1)
    _, U_H22 = torch.linalg.eigh(rows_H2D @ rows_H2D.mT)
    u_H2 = U_H22[..., -1]
    u_H2 = torch.where(u_H2[:, :1] < 0, -u_H2, u_H2)
    first_H = u_H2[:, 0].clamp_min(SMALLEST)
    W_HD = first_H[:, None] * (u_H2[..., None] * rows_H2D).sum(1)
    return W_HD, u_H2[:, 1] / first_H
