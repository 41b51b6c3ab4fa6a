"""The optimiser over what a stage trains, and the course of its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from peftcli.config.schema import OptimConfig


def build(config: OptimConfig, model: nn.Module, groups: list[dict]) -> torch.optim.Optimizer:
    """AdamW over the groups that a method names; vectors and biases get no weight decay.

    Args:
        config: Rates and decays.
        model: Holds the parameters.
        groups: `{"names": [...], "lr_scale": float}` each, as `Method.parameter_groups` gives them.
    """
    parameters = dict(model.named_parameters())
    rows = []
    for group in groups:
        for decays in (True, False):
            names = [n for n in group["names"] if (parameters[n].ndim > 1 and group.get("decays", True)) == decays]
            if names:
                rows.append(
                    {
                        "params": [parameters[n] for n in names],
                        "names": names,
                        "lr_scale": group.get("lr_scale", 1.0),
                        "weight_decay": config.weight_decay if decays else 0.0,
                    }
                )
    for row in rows:
        del row["names"]
    return torch.optim.AdamW(rows, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)


def rate(config: OptimConfig, step: int, steps: int) -> float:
    """Share of the highest learning rate at a step: linear warm-up, then cosine, linear or constant.

    Args:
        config: Schedule, warm-up and final shares.
        step: Counted from 0 within the stage.
        steps: The stage's length.
    """
    warmup = math.ceil(config.warmup_share * steps) if config.warmup_share else 0
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, steps - warmup)
    fall = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.final_share + (1 - config.final_share) * fall


def set_rate(optimiser: torch.optim.Optimizer, config: OptimConfig, step: int, steps: int) -> float:
    """Set every group's learning rate for a step and return the highest."""
    lr = config.lr * rate(config, step, steps)
    for group in optimiser.param_groups:
        group["lr"] = lr * group["lr_scale"]
    return lr


def state_tensors(optimiser: torch.optim.Optimizer, names: dict[nn.Parameter, str]) -> dict[str, torch.Tensor]:
    """The optimiser's state as flat tensors, `exp_avg/<parameter name>` and so on."""
    states = {names[p]: optimiser.state[p] for group in optimiser.param_groups for p in group["params"]}
    return {f"{key}/{name}": value for name, state in states.items() for key, value in state.items()}


def load_state(optimiser: torch.optim.Optimizer, names: dict[nn.Parameter, str], tensors: dict[str, torch.Tensor]):
    """Put back what `state_tensors` gave."""
    by_name = {name: p for p, name in names.items()}
    for flat, value in tensors.items():
        key, name = flat.split("/", 1)
        parameter = by_name[name]
        optimiser.state[parameter][key] = value if key == "step" else value.to(parameter.device)
