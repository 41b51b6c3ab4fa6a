"""The weights of one attention head in pairs: what matters of q and k is their product, and of v and o theirs.

A head's logits are (W_q x + b_q)ᵀ (W_k y + b_k). What b_k adds is the same for all keys y and leaves the softmax, so
they depend on M = [W_q b_q]ᵀ W_k alone, of rank S at most. Its output is W_o (sum_y a_y (W_v y + b_v)) with sum a = 1,
so that b_v comes through as W_o b_v, and only W_o W_v matters. The best pair of a smaller width is a truncated singular
value decomposition of the product as the data sees it: of L~ᵀ M L with L~ L~ᵀ = E[(x, 1) (x, 1)ᵀ], and of W_o W_v L.
The mean input m is taken off what keys and values see, L Lᵀ = E[x xᵀ] - m mᵀ: on the side of the keys it adds the same
to all logits of a query, and what the smaller values lose of W_o W_v m, the bias of the output makes up for.

Letters: D width of the model, G heads, S width of a head, T smaller width of a head. Valid where nothing stands between
q and k: not with rotary positions, and not with a norm on them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftcli.methods.rowcol import maths
from peftcli.methods.rowcol.moments import Moment


@dataclass(frozen=True)
class Projections:
    """The four matrices of an attention and their biases.

    Attributes:
        q: [G S, D].
        k: [G S, D].
        v: [G S, D].
        o: [D, G S].
        q_bias: [G S] or None.
        o_bias: [D] or None.
        v_bias: [G S] or None; none where the widths are smaller.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    o_bias: Tensor | None = None
    v_bias: Tensor | None = None

    @property
    def has_bias(self) -> bool:
        """Whether something constant is added to the output."""
        return self.o_bias is not None or self.v_bias is not None


def joint(given: Projections, heads: int, width: int, seen: Moment | None) -> Projections:
    """Each head with `width` dimensions in place of its own; at its own width the same function.

    Args:
        given: The projections.
        heads: G.
        width: T.
        seen: What goes into the attention; None counts all directions alike.

    Returns:
        The smaller ones, in float64. The scale of the logits stays that of S.
    """
    wide_GSE, k_GSD, v_GSD, o_GDS = _split(given, heads)
    asking_EE, keys_DD, values_DD = _roots(given, seen)
    left_GSE, right_GSD = product(wide_GSE, k_GSD, asking_EE, keys_DD, width)
    v_GTD, o_GDT = _values(v_GSD, o_GDS, values_DD, width)
    constant_D = (o_GDS @ _bias(given.v_bias, given.v).unflatten(0, (heads, -1))[..., None]).sum((0, 2))
    o_bias = constant_D + _bias(given.o_bias, given.o)
    if seen is not None and given.has_bias:
        o_bias += (o_GDS @ v_GSD - o_GDT @ v_GTD).sum(0) @ seen.centre
    return Projections(
        q=left_GSE[..., :-1].flatten(0, 1),
        k=right_GSD.flatten(0, 1),
        v=v_GTD.flatten(0, 1),
        o=o_GDT.transpose(0, 1).flatten(1),
        q_bias=None if given.q_bias is None else left_GSE[..., -1].flatten(),
        o_bias=o_bias if given.has_bias else None,
    )


def product(a_GSE: Tensor, b_GSD: Tensor, La_EE: Tensor, Lb_DD: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """a' [G, T, E] and b' [G, T, D] with a'ᵀ b' the best of rank T for aᵀ b, as seen through La and Lb."""
    U, sigma, V = _pair(a_GSE @ La_EE, b_GSD @ Lb_DD, width)
    half_GT1 = sigma.sqrt()[..., None]
    # Both come back from the seen space through their own rows, whose span they stay in.
    a_GTE = (half_GT1 * U.mT) @ torch.linalg.pinv(a_GSE @ La_EE) @ a_GSE
    b_GTD = (half_GT1 * V.mT) @ torch.linalg.pinv(b_GSD @ Lb_DD) @ b_GSD
    return a_GTE, b_GTD


def energies(given: Projections, heads: int, seen: Moment | None) -> tuple[Tensor, Tensor]:
    """Squared singular values [S] of the q-k and of the v-o products, summed over heads, falling."""
    wide_GSE, k_GSD, v_GSD, o_GDS = _split(given, heads)
    asking_EE, keys_DD, values_DD = _roots(given, seen)
    width = k_GSD.shape[1]
    qk = _pair(wide_GSE @ asking_EE, k_GSD @ keys_DD, width)[1]
    vo = _pair(o_GDS.mT, v_GSD @ values_DD, width)[1]
    return qk.square().sum(0), vo.square().sum(0)


def _split(given: Projections, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[q b_q] [G, S, D + 1], k and v [G, S, D], o [G, D, S], in float64."""
    q_GSD, k_GSD, v_GSD = (maths.wide(m).unflatten(0, (heads, -1)) for m in (given.q, given.k, given.v))
    o_GDS = maths.wide(given.o).unflatten(1, (heads, -1)).transpose(0, 1)
    bias_GS1 = _bias(given.q_bias, given.q).unflatten(0, (heads, -1))[..., None]
    return torch.cat([q_GSD, bias_GS1], dim=2), k_GSD, v_GSD, o_GDS


def _roots(given: Projections, seen: Moment | None) -> tuple[Tensor, Tensor, Tensor]:
    """L of what queries see [D + 1, D + 1], of what keys see and of what values see [D, D]."""
    if seen is None:
        L_EE = torch.eye(given.q.shape[1] + 1, dtype=torch.float64, device=maths.wide(given.q).device)
        return L_EE, L_EE[1:, 1:], L_EE[1:, 1:]
    C_DD, m_D = seen.mean, seen.centre
    whole_EE = torch.cat([torch.cat([C_DD, m_D[:, None]], 1), torch.cat([m_D, m_D.new_ones(1)])[None]])
    spread_DD = maths.root(C_DD - torch.outer(m_D, m_D))
    return maths.root(whole_EE), spread_DD, spread_DD if given.has_bias else maths.root(C_DD)


def _values(v_GSD: Tensor, o_GDS: Tensor, L_DD: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """v' [G, T, D] and o' [G, D, T]: U_T U_Tᵀ W_o W_v with the column space as the data sees it."""
    U, _, _ = _pair(o_GDS.mT, v_GSD @ L_DD, width)
    v_GTD = U.mT @ o_GDS @ v_GSD
    return v_GTD, U


def _pair(a_GSE: Tensor, b_GSD: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triples of aᵀ b, from two small QR decompositions: U [G, E, T], sigma [G, T], V [G, D, T]."""
    Qa, Ra = torch.linalg.qr(a_GSE.mT)
    Qb, Rb = torch.linalg.qr(b_GSD.mT)
    U, sigma, Vt = torch.linalg.svd(Ra @ Rb.mT)
    return Qa @ U[..., :width], sigma[..., :width], Qb @ Vt.mT[..., :width]


def _bias(bias: Tensor | None, weight: Tensor) -> Tensor:
    return weight.new_zeros(len(weight)).double() if bias is None else maths.wide(bias)
