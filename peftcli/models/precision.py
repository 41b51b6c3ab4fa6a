"""Which arithmetic the hardware does well."""

from __future__ import annotations

from typing import Literal

import torch

from peftcli.config.errors import Mistake, UserError

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose(training_precision: str, device: str | torch.device) -> Precision:
    """The precision of the forward pass; `auto` takes bf16 where there are instructions for it.

    Without them it takes fp16 on CUDA and fp32 elsewhere.

    Raises:
        UserError: fp16 on a CPU: gradients underflow there, and bf16 needs no loss scale.
    """
    kind = torch.device(device).type
    if training_precision == "fp16" and kind == "cpu":
        raise UserError(
            Mistake("training.precision=fp16 does not train on a CPU", allowed=("auto", "fp32", "bf16"), nearest="bf16")
        )
    if training_precision in ("fp32", "bf16", "fp16"):
        return training_precision  # type: ignore[return-value]
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if kind == "cpu" and _cpu_has_bf16() else "fp32"


def autocast(precision: str, device: str | torch.device) -> torch.autocast:
    """A context for the forward pass in this precision; it changes nothing in fp32."""
    dtype = None if precision == "fp32" else DTYPES[precision]
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None)


def _cpu_has_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
