"""The optimiser over what a stage trains, and the course of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from peftcli.config.schema import OptimConfig
from peftcli.training import sharding


def build(config: OptimConfig, model: nn.Module, groups: list[dict]) -> torch.optim.Optimizer:
    """AdamW, or plain descent, over the groups that a method names; vectors and biases get no weight decay.

    Args:
        config: Rates and decays.
        model: Holds the parameters.
        groups: As `Method.parameter_groups` gives them.
    """
    parameters = dict(model.named_parameters())
    rows: dict[str, list[dict[str, Any]]] = {"adamw": [], "sgd": []}
    for index, group in enumerate(groups):
        for decays in (True, False):
            names = [n for n in group["names"] if (parameters[n].ndim > 1 and group.get("decays", True)) == decays]
            if names:
                scale = group["lr"] / config.lr if "lr" in group else group.get("lr_scale", 1.0)
                kind = group.get("optimiser", "adamw")
                row = {"params": [parameters[n] for n in names], "lr_scale": scale, "kind": kind}
                row |= {"weight_decay": config.weight_decay if decays else 0.0}
                row |= {"clip_norm": group["clip_norm"], "clips": index} if "clip_norm" in group else {}
                rows[kind].append(row)
    betas = (config.betas[0], config.betas[1])
    parts: dict[str, torch.optim.Optimizer] = {}
    if rows["adamw"]:
        parts["adamw"] = torch.optim.AdamW(rows["adamw"], lr=config.lr, betas=betas, eps=config.eps, fused=True)
    if rows["sgd"]:
        parts["sgd"] = torch.optim.SGD(rows["sgd"], lr=config.lr)
    return next(iter(parts.values())) if len(parts) == 1 else Together(parts)


class Together(torch.optim.Optimizer):
    """Several optimisers that step as one, over the groups of all; the state is here.

    Args:
        parts: By what their groups say of their `kind`.
    """

    def __init__(self, parts: dict[str, torch.optim.Optimizer]):
        super().__init__([group for part in parts.values() for group in part.param_groups], {})
        self.parts = parts

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # nothing here calls it with a closure
        """Step each."""
        for kind, part in self.parts.items():
            # Anew each time: loading a state puts other groups and another state in place of these.
            part.param_groups = [group for group in self.param_groups if group["kind"] == kind]
            part.state = self.state
            part.step()


def clips(
    optimiser: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], usual: float | None
) -> list[tuple[list[nn.Parameter], float | None]]:
    """Parameters whose gradients are clipped together, and their largest norm, None where there is none.

    Args:
        optimiser: Of `build`.
        parameters: All that it moves, in the order that they are to have.
        usual: Of the groups that name none.
    """
    group_of = {p: group for group in optimiser.param_groups for p in group["params"]}
    found: dict[int | None, tuple[list[nn.Parameter], float | None]] = {}
    for parameter in parameters:
        group = group_of[parameter]
        found.setdefault(group.get("clips"), ([], group.get("clip_norm", usual)))[0].append(parameter)
    return list(found.values())


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
    """The optimiser's state as flat tensors, `exp_avg/<parameter name>` and so on; whole ones, for which every process
    has to ask."""
    states = {names[p]: optimiser.state[p] for group in optimiser.param_groups for p in group["params"]}
    return {
        f"{key}/{name}": sharding.whole(value)
        for name, state in states.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def load_state(optimiser: torch.optim.Optimizer, names: dict[nn.Parameter, str], tensors: dict[str, torch.Tensor]):
    """Put back what `state_tensors` gave."""
    by_name = {name: p for p, name in names.items()}
    for flat, value in tensors.items():
        key, name = flat.split("/", 1)
        parameter = by_name[name]
        optimiser.state[parameter][key] = value if key == "step" else sharding.like(parameter.detach(), value)
