"""Convolutions as matrices, and what a projection of them is: smaller convolutions one after the other.

A kernel W [O, I, H, V] is a matrix [O, I H V] over patches of its input. Its column space gives K filters of the same
size and a 1x1 convolution; the column spaces of its two channel unfoldings give Tucker-2, 1x1, H x V, 1x1 (Kim et al.,
ICLR 2016). Stride, padding and dilation belong to the one that has the window.

Letters: O output channels, I input channels, H and V height and width of the window, K filters, P and Q inner channels,
N patches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftcli.methods.rowcol import maths


def patches(x_BIXY: Tensor, layer: nn.Conv2d) -> Tensor:
    """What each output position reads, [N, I H V]."""
    if layer.kernel_size == (1, 1) and layer.padding == (0, 0):
        down, across = layer.stride
        return x_BIXY[:, :, ::down, ::across].movedim(1, -1).flatten(0, -2)
    assert not isinstance(layer.padding, str)
    found_BDN = functional.unfold(x_BIXY, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return found_BDN.transpose(1, 2).flatten(0, 1)


def by_filters(W_OIHV: Tensor, C_DD: Tensor | None, filters: int) -> tuple[Tensor, Tensor]:
    """The best kernel of so many filters, as their kernel [K, I, H, V] and a 1x1 kernel [O, K, 1, 1].

    Args:
        W_OIHV: The kernel.
        C_DD: Second moment of its patches, D = I H V; None counts all alike.
        filters: K.
    """
    factors = maths.truncated(W_OIHV.flatten(1), C_DD, filters)
    return factors.reduce.view(-1, *W_OIHV.shape[1:]), factors.expand[:, :, None, None]


def tucker2(W_OIHV: Tensor, inputs: int, outputs: int, sweeps: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """Kernels of 1x1, H x V and 1x1 whose product is near W: [P, I, 1, 1], [Q, P, H, V] and [O, Q, 1, 1].

    Begun with the leading singular vectors of the two unfoldings (HOSVD), then improved by turns (HOOI): with one basis
    fixed the other is the leading subspace of what is left, so the error never rises.

    Args:
        W_OIHV: The kernel.
        inputs: P, channels between the first and the second; at most H V Q are of use.
        outputs: Q, channels between the second and the third; at most H V P are of use.
        sweeps: Turns.
    """
    W_OIHV = maths.wide(W_OIHV)
    V_IP = maths.leading(W_OIHV.transpose(0, 1).flatten(1), inputs)[0]
    U_OQ = maths.leading(W_OIHV.flatten(1), outputs)[0]
    for _ in range(sweeps if inputs < W_OIHV.shape[1] or outputs < len(W_OIHV) else 0):
        U_OQ = maths.leading(torch.einsum("oihv,ip->ophv", W_OIHV, V_IP).flatten(1), outputs)[0]
        V_IP = maths.leading(torch.einsum("oihv,oq->iqhv", W_OIHV, U_OQ).flatten(1), inputs)[0]
    core_QPHV = torch.einsum("oihv,oq,ip->qphv", W_OIHV, U_OQ, V_IP)
    return V_IP.mT[:, :, None, None], core_QPHV, U_OQ[:, :, None, None]


def tucker2_parameters(outputs: int, inputs: int, window: int, inner_outputs: int, inner_inputs: int) -> int:
    """Numbers in Tucker-2's three kernels: I P + H V P Q + O Q."""
    return inputs * inner_inputs + window * inner_inputs * inner_outputs + outputs * inner_outputs


def cannot(layer: nn.Module) -> str:
    """Why a layer has no such matrix; empty where it has one."""
    if isinstance(layer, nn.Linear):
        return ""
    if not isinstance(layer, nn.Conv2d):
        return f"a {type(layer).__name__} is neither Linear nor Conv2d"
    if layer.groups > 1:
        return "its channels are in groups" if layer.groups < layer.in_channels else "each channel has its own filter"
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return f"it pads by {layer.padding_mode if layer.padding_mode != 'zeros' else layer.padding!r}"
    return ""
