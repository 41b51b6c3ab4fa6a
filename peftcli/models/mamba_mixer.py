"""One forward pass of the Mamba block for every device, with sub-modules called as modules.

Transformers' own forward reads raw weights (`conv1d.weight`, `dt_proj.weight`, and with its fused kernel `x_proj` and
`out_proj` too), so an adapter around those modules is bypassed without a word, and PEFT refuses some of them. Here each
is called, whatever stands in its place; only the scan goes to a CUDA kernel where there is one.

Shapes: B rows, L tokens, E width of the model, D channels, N states, R rank of the time step, K width of the
convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.mamba.modeling_mamba import MambaMixer

from peftcli.models.selective_scan import selective_scan

Project = Callable[[str, torch.Tensor], torch.Tensor]
"""Applies the sub-module of this name to its input."""


def install(model: nn.Module) -> int:
    """Give each Mamba block of a Transformers model this forward pass, in place; parameters and their names stay.

    Returns:
        How many blocks there are.
    """
    mixers = [module for module in model.modules() if isinstance(module, MambaMixer)]
    for mixer in mixers:
        mixer.__class__ = Mixer
    if mixers:
        _lift_refusal()
    return len(mixers)


class Mixer(MambaMixer):
    """Transformers' block with the forward pass of this file."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache_params: Any = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[B, L, E] -> [B, L, E]; see `mix`."""
        return mix(self, hidden_states, cache_params, attention_mask)


def mix(
    mixer: Any,
    hidden_BLE: torch.Tensor,
    cache: Any = None,
    mask_BL: torch.Tensor | None = None,
    A_log_DN: torch.Tensor | None = None,
    project: Project | None = None,
    keep_D: torch.Tensor | None = None,
) -> torch.Tensor:
    """The block's forward pass (Gu and Dao, 2023, figure 3).

    Args:
        mixer: A `MambaMixer`.
        hidden_BLE: Its input.
        cache: Transformers' cache while generating; holds the convolution's last K inputs and the state.
        mask_BL: Nonzero at tokens, zero at padding.
        A_log_DN: In place of the block's own `A_log`.
        project: In place of calling the sub-modules.
        keep_D: Boolean; where it is false the channel's output is exactly zero.
    """
    project = project or (lambda name, x: getattr(mixer, name)(x))
    dtype, length = hidden_BLE.dtype, hidden_BLE.shape[1]
    state_BDN = cache.get_recurrent_state(mixer.layer_idx, state_idx=0) if cache is not None else None
    if mask_BL is not None and mask_BL.shape[1] != length:  # the mask of all tokens so far, while generating
        mask_BL = mask_BL[:, -length:]
    mask_BL1 = None if mask_BL is None else mask_BL[..., None].to(dtype)

    x_BLD, gate_BLD = project("in_proj", _masked(hidden_BLE, mask_BL1)).chunk(2, dim=-1)
    window_BDL = x_BLD.transpose(1, 2)
    if cache is not None:
        window_BDL = cache.update_conv_state(window_BDL, mixer.layer_idx, conv_kernel_size=mixer.conv_kernel_size)
    # The convolution pads both sides by K - 1, so its first outputs are the causal ones.
    conv_BDL = project("conv1d", window_BDL)[..., : window_BDL.shape[-1]][..., -length:]
    x_BLD = _masked(mixer.act(conv_BDL).transpose(1, 2), mask_BL1)

    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    step_BLR, B_BLN, C_BLN = project("x_proj", x_BLD).split(sizes, dim=-1)
    plain = torch.autocast(hidden_BLE.device.type, enabled=False)  # a step size has no bits to lose
    # Half-precision weights have lost theirs, and an adapter in float32 on them needs autocast to cast its input.
    kind = mixer.dt_proj.weight.dtype
    with nullcontext() if kind in (torch.bfloat16, torch.float16) else plain:
        step_BLD = project("dt_proj", step_BLR.to(kind))
    with plain:
        delta_BLD = F.softplus(_wide(step_BLD))
        A_DN = -torch.exp(_wide(mixer.A_log if A_log_DN is None else A_log_DN))
        y_BLD, last_BDN = scan(x_BLD, delta_BLD, A_DN, B_BLN, C_BLN, state_BDN, final=cache is not None)
    if cache is not None:
        cache.update_recurrent_state(last_BDN, mixer.layer_idx)
    y_BLD = (y_BLD + x_BLD * _wide(mixer.D)) * mixer.act(gate_BLD)
    if keep_D is not None:
        y_BLD = y_BLD.masked_fill(~keep_D, 0)
    return project("out_proj", y_BLD.to(dtype))


def scan(
    x_BLD: torch.Tensor,
    delta_BLD: torch.Tensor,
    A_DN: torch.Tensor,
    B_BLN: torch.Tensor,
    C_BLN: torch.Tensor,
    state_BDN: torch.Tensor | None,
    final: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scan by the CUDA kernel where it is installed and can do it, else in PyTorch; see `selective_scan`."""
    kernel = _kernel() if x_BLD.is_cuda and state_BDN is None else None
    if kernel is None:
        return selective_scan(x_BLD, delta_BLD, A_DN, B_BLN, C_BLN, state_BDN)
    # One type for all, as the kernel wants it; in half precision delta would be rounded.
    x_BDL, delta_BDL, B_BNL, C_BNL = (t.float().transpose(1, 2).contiguous() for t in (x_BLD, delta_BLD, B_BLN, C_BLN))
    found = kernel(x_BDL, delta_BDL, A_DN, B_BNL, C_BNL, return_last_state=final)
    y_BDL, last_BDN = found if final else (found, None)
    return y_BDL.transpose(1, 2).to(x_BLD.dtype), last_BDN


@cache
def _kernel() -> Callable[..., Any] | None:
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    return selective_scan_fn


def _masked(tensor_BLX: torch.Tensor, mask_BL1: torch.Tensor | None) -> torch.Tensor:
    return tensor_BLX if mask_BL1 is None else tensor_BLX * mask_BL1.to(tensor_BLX.dtype)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _lift_refusal() -> None:
    """Let PEFT's tuners into `out_proj` and `conv1d` of models with this forward pass, and of no others."""
    from peft.tuners import tuners_utils

    refuse = tuners_utils._check_lora_target_modules_mamba
    if getattr(refuse, "spares", None) is Mixer:
        return

    def check(peft_config: Any, model: nn.Module, target_name: str) -> None:
        if not any(isinstance(module, Mixer) for module in model.modules()):
            refuse(peft_config, model, target_name)

    check.spares = Mixer  # type: ignore[attr-defined]
    tuners_utils._check_lora_target_modules_mamba = check
