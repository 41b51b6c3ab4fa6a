"""What PEFT's AdaLoRA needs of a training loop: its length, a penalty, and a state that outlives a checkpoint.

Source: Zhang et al., AdaLoRA, ICLR 2023. PEFT adds the penalty only where it computes the loss itself, which this
project does not ask of a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from peftcli.config.errors import Mistake, UserError

AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def schedule(arguments: dict[str, Any], total_steps: int) -> Callable[[Any], None]:
    """The start of the only stage: tell the model how long it is.

    Raises:
        UserError: `tinit` and `tfinal` leave no step between them.
    """
    total = arguments.get("total_step", total_steps)
    first, last = arguments.get("tinit", 0), arguments.get("tfinal", 0)
    if first >= total - last:
        raise UserError(
            Mistake(f"AdaLoRA's tinit={first} and tfinal={last} leave nothing of {total} steps to reduce ranks in")
        )

    def start(model: Any) -> None:
        model.base_model.rankallocator.set_total_step(total)

    return start


def freeze_rank_counts(model: Any) -> None:
    """Keep `ranknum` a constant: PEFT trains it where the base is not float32, and does not save it."""
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)


def penalty(model: Any) -> torch.Tensor:
    """The mean distance of the factors from orthogonality, times `orth_reg_weight`; a scalar."""
    adapter = model.base_model.trainable_adapter_name
    distances = []
    for name, factor in model.named_parameters():
        if adapter in name and ("lora_A" in name or "lora_B" in name):
            gram_RR = factor @ factor.T if "lora_A" in name else factor.T @ factor
            one_RR = torch.eye(len(gram_RR), dtype=gram_RR.dtype, device=gram_RR.device)
            distances.append(torch.linalg.norm(gram_RR - one_RR))
    return model.peft_config[adapter].orth_reg_weight * torch.stack(distances).mean()


def state(model: Any) -> dict[str, torch.Tensor]:
    """The averages of importance, and the allocation once there is one."""
    allocator = model.base_model.rankallocator
    found = {f"{kind}/{name}": value for kind in AVERAGES for name, value in getattr(allocator, kind).items()}
    pattern = allocator.peft_config.rank_pattern or {}
    return found | {f"rank_pattern/{name}": torch.tensor(kept) for name, kept in pattern.items()}


def restore(model: Any, saved: dict[str, torch.Tensor]) -> None:
    """Take back what `state` gave."""
    allocator = model.base_model.rankallocator
    allocator.reset_ipt()
    pattern = {}
    for key, value in saved.items():
        kind, name = key.split("/", 1)
        if kind == "rank_pattern":
            pattern[name] = value.tolist()
        else:
            getattr(allocator, kind)[name] = value.clone()
    allocator.peft_config.rank_pattern = pattern or None
