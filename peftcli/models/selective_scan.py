"""The selective scan of Mamba (S6) in plain PyTorch: chunk by chunk forwards, states computed again backwards.

The recurrence, per row b, channel d and state n, with the simplified discretisation of the Mamba paper (Gu and Dao,
2023, arXiv 2312.00752, section 3.2 and algorithm 2):

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t          y_t = sum_n C_t h_t

Its gradient runs backwards in time: with g_t = dLoss/dh_t,

    g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}

    dC_t = sum_d h_t dy_t      dB_t = sum_d g_t delta_t x_t      d(delta_t x_t) = sum_n B_t g_t
    q_t = g_t exp(delta_t A) h_{t-1}      d delta_t += sum_n A q_t      dA = sum_{b,t} delta_t q_t

Only the state at the start of each chunk is kept, so memory is O(batch x channels x states x chunks) where autograd
through the recurrence would keep O(batch x channels x states x length) several times over.

Shapes: B rows, L steps, T steps of a chunk, D channels, N states. Inside, time comes first and channels last: a step is
one contiguous block, and what is shared by all channels or all states broadcasts along rows of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch._higher_order_ops.scan import scan_op
from torch._subclasses.fake_tensor import FakeTensor

CHUNK_ELEMENTS = 2**19
"""States of a chunk: three buffers of this many float32 stay in a core's cache."""


def selective_scan(
    x_BLD: torch.Tensor,
    delta_BLD: torch.Tensor,
    A_DN: torch.Tensor,
    B_BLN: torch.Tensor,
    C_BLN: torch.Tensor,
    state_BDN: torch.Tensor | None = None,
    resets_BL: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scan along L.

    Args:
        x_BLD: Inputs; their type is the output's.
        delta_BLD: Step sizes, positive (after softplus).
        A_DN: Diagonal of the state matrix, negative.
        B_BLN: Input weights of the states.
        C_BLN: Output weights of the states.
        state_BDN: State before the first step; zero where it is None.
        resets_BL: Boolean; true where a new sequence begins in a packed row: the state is zero before that step.

    Returns:
        Outputs [B, L, D] in the type of `x_BLD`, and the state after the last step [B, D, N]. States are float32
        (float64 where `A_DN` is), whatever the inputs are.
    """
    if not x_BLD.shape[1]:
        raise ValueError("selective_scan: a row of no steps has no output")
    if torch.compiler.is_exporting():
        return _step_by_step(x_BLD, delta_BLD, A_DN, B_BLN, C_BLN, state_BDN, resets_BL)
    with torch.autocast(x_BLD.device.type, enabled=False):  # it would round the states in each product
        # A slice of a few steps of a [B, D, L] layout would touch a line of the cache for each number.
        inputs = (tensor.contiguous() for tensor in (x_BLD, delta_BLD))
        return _Scan.apply(*inputs, A_DN, B_BLN.contiguous(), C_BLN.contiguous(), state_BDN, resets_BL)


def _step_by_step(
    x_BLD: torch.Tensor,
    delta_BLD: torch.Tensor,
    A_DN: torch.Tensor,
    B_BLN: torch.Tensor,
    C_BLN: torch.Tensor,
    state_BDN: torch.Tensor | None,
    resets_BL: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence as one operator for graphs (ONNX has it as Scan), where a loop would hold for one length alone."""
    dtype = torch.float64 if A_DN.dtype == torch.float64 else torch.float32
    A_DN = A_DN.to(dtype)
    rows, length, channels = x_BLD.shape
    if state_BDN is None:
        state_BDN = A_DN.new_zeros(rows, channels, A_DN.shape[1])
    if resets_BL is None:
        resets_BL = torch.zeros(rows, length, dtype=torch.bool, device=x_BLD.device)

    def step(h_BDN: torch.Tensor, *now: torch.Tensor) -> list[torch.Tensor]:
        x_BD, delta_BD, B_BN, C_BN, reset_B, A_DN = now
        decay_BDN = torch.exp(delta_BD[:, :, None] * A_DN) * ~reset_B[:, None, None]
        h_BDN = decay_BDN * h_BDN + (delta_BD * x_BD)[:, :, None] * B_BN[:, None]
        return [h_BDN, (h_BDN * C_BN[:, None]).sum(-1)]

    inputs = [tensor.to(dtype).transpose(0, 1) for tensor in (x_BLD, delta_BLD, B_BLN, C_BLN)]
    # The operator itself: the function `scan` compiles, and what it compiled before for other shapes leaks in.
    last_BDN, y_LBD = scan_op(step, [state_BDN.to(dtype)], [*inputs, resets_BL.T], (A_DN,))
    return y_LBD.transpose(0, 1).to(x_BLD.dtype), last_BDN


class _Chunks:
    """One pass over the chunks: the inputs of a chunk time first, and its buffers, made once."""

    def __init__(
        self,
        x_BLD: torch.Tensor,
        delta_BLD: torch.Tensor,
        A_DN: torch.Tensor,
        B_BLN: torch.Tensor,
        resets_BL: torch.Tensor | None,
        buffers: int,
    ):
        (rows, self.length, channels), states = x_BLD.shape, A_DN.shape[1]
        self.dtype = torch.float64 if A_DN.dtype == torch.float64 else torch.float32
        self.x_BLD, self.delta_BLD, self.B_BLN, self.resets_BL = x_BLD, delta_BLD, B_BLN, resets_BL
        self.A_ND = A_DN.detach().to(self.dtype).T.contiguous()
        self.step = max(1, min(self.length, CHUNK_ELEMENTS // (rows * channels * states)))
        self.shape = (rows, states, channels)
        self._fake = isinstance(x_BLD, FakeTensor)
        self._buffers = A_DN.new_empty((buffers, self.step, *self.shape), dtype=self.dtype)

    def __len__(self) -> int:
        return -(-self.length // self.step)

    def spans(self) -> Iterator[slice]:
        # Without contents (counting memory) one chunk has the shapes of all.
        for start in range(0, self.step if self._fake else self.length, self.step):
            yield slice(start, min(start + self.step, self.length))

    def early(self, tensor: torch.Tensor, span: slice) -> torch.Tensor:
        """[B, L, ...] -> [T, B, ...] of the span, in the states' type."""
        return tensor[:, span].transpose(0, 1).to(self.dtype, memory_format=torch.contiguous_format)

    def buffers(self, span: slice) -> torch.Tensor:
        return self._buffers[:, : span.stop - span.start]

    def states(
        self, span: slice, start_BND: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Decay and states [T, B, N, D] of a span (in the first two buffers); delta, delta x [T, B, D], B [T, B, N]."""
        decay_TBND, h_TBND = self.buffers(span)[:2]
        delta_TBD, B_TBN = self.early(self.delta_BLD, span), self.early(self.B_BLN, span)
        u_TBD = delta_TBD * self.early(self.x_BLD, span)
        torch.mul(delta_TBD[:, :, None], self.A_ND, out=decay_TBND)
        decay_TBND.exp_()
        if self.resets_BL is not None:
            decay_TBND.mul_(~self.resets_BL[:, span].T[:, :, None, None])
        torch.mul(B_TBN[..., None], u_TBD[:, :, None], out=h_TBND)
        before_BND = start_BND
        for h_BND, decay_BND in zip(h_TBND, decay_TBND, strict=True):
            before_BND = h_BND.addcmul_(decay_BND, before_BND)
        return decay_TBND, h_TBND, delta_TBD, u_TBD, B_TBN


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BLD: torch.Tensor,
        delta_BLD: torch.Tensor,
        A_DN: torch.Tensor,
        B_BLN: torch.Tensor,
        C_BLN: torch.Tensor,
        state_BDN: torch.Tensor | None,
        resets_BL: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        chunks = _Chunks(x_BLD, delta_BLD, A_DN, B_BLN, resets_BL, buffers=2)
        keep = any(ctx.needs_input_grad)
        starts_KBND = chunks.A_ND.new_empty((len(chunks) if keep else 0, *chunks.shape))
        h_BND = chunks.A_ND.new_zeros(chunks.shape)
        if state_BDN is not None:
            h_BND.copy_(state_BDN.transpose(1, 2))
        y_BLD = torch.empty_like(x_BLD, memory_format=torch.contiguous_format)
        for index, span in enumerate(chunks.spans()):
            if keep:
                starts_KBND[index] = h_BND
            _, h_TBND, *_ = chunks.states(span, h_BND)
            y_TB1D = chunks.early(C_BLN, span)[:, :, None] @ h_TBND
            y_BLD[:, span] = y_TB1D[:, :, 0].transpose(0, 1)
            h_BND.copy_(h_TBND[-1])
        ctx.save_for_backward(x_BLD, delta_BLD, A_DN, B_BLN, C_BLN, state_BDN, resets_BL, starts_KBND)
        return y_BLD, h_BND.transpose(1, 2).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_BLD: torch.Tensor, dlast_BDN: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with torch.autocast(dy_BLD.device.type, enabled=False):
            return _backward(ctx, dy_BLD, dlast_BDN)


def _backward(ctx: Any, dy_BLD: torch.Tensor, dlast_BDN: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the seven inputs, chunks from last to first."""
    x_BLD, delta_BLD, A_DN, B_BLN, C_BLN, state_BDN, resets_BL, starts_KBND = ctx.saved_tensors
    need_x, need_delta, need_A, need_B, need_C, need_state, _ = ctx.needs_input_grad
    chunks = _Chunks(x_BLD, delta_BLD, A_DN, B_BLN, resets_BL, buffers=3)
    dx_BLD, ddelta_BLD, dB_BLN, dC_BLN = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed else None
        for tensor, needed in ((x_BLD, need_x), (delta_BLD, need_delta), (B_BLN, need_B), (C_BLN, need_C))
    )
    dA_ND = torch.zeros_like(chunks.A_ND) if need_A else None
    carried_BND = dlast_BDN.to(chunks.dtype).transpose(1, 2).contiguous()  # what later steps say of the last state
    for index, span in reversed(list(enumerate(chunks.spans()))):
        start_BND = starts_KBND[index]
        decay_TBND, h_TBND, delta_TBD, u_TBD, B_TBN = chunks.states(span, start_BND)
        dy_TBD, g_TBND = chunks.early(dy_BLD, span), chunks.buffers(span)[2]
        if dC_BLN is not None:
            dC_BLN[:, span] = (dy_TBD[:, :, None] @ h_TBND.mT)[:, :, 0].transpose(0, 1)
        torch.mul(chunks.early(C_BLN, span)[..., None], dy_TBD[:, :, None], out=g_TBND)
        g_TBND[-1].add_(carried_BND)
        gs_BND, decays_BND = g_TBND.unbind(), decay_TBND.unbind()
        for t in range(len(gs_BND) - 2, -1, -1):
            gs_BND[t].addcmul_(decays_BND[t + 1], gs_BND[t + 1])
        torch.mul(decay_TBND[0], g_TBND[0], out=carried_BND)
        if dB_BLN is not None:
            dB_BLN[:, span] = (u_TBD[:, :, None] @ g_TBND.mT)[:, :, 0].transpose(0, 1)
        if need_x or need_delta:
            du_TBD = (B_TBN[:, :, None] @ g_TBND)[:, :, 0]
        if dx_BLD is not None:
            dx_BLD[:, span] = (du_TBD * delta_TBD).transpose(0, 1)
        if need_delta or need_A:
            q_TBND = decay_TBND.mul_(g_TBND)
            q_TBND[0].mul_(start_BND)
            q_TBND[1:].mul_(h_TBND[:-1])
        if dA_ND is not None:
            dA_ND += torch.mul(q_TBND, delta_TBD[:, :, None], out=h_TBND).sum((0, 1))
        if ddelta_BLD is not None:
            ddelta_TBD = torch.sum(q_TBND.mul_(chunks.A_ND), dim=2)
            ddelta_BLD[:, span] = ddelta_TBD.addcmul_(du_TBD, chunks.early(x_BLD, span)).transpose(0, 1)
    dA_DN = dA_ND.T.to(A_DN.dtype) if dA_ND is not None else None
    dstate_BDN = carried_BND.transpose(1, 2).to(state_BDN.dtype) if need_state else None
    return dx_BLD, ddelta_BLD, dA_DN, dB_BLN, dC_BLN, dstate_BDN, None
