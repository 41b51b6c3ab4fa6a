"""FSDP: the base's tensors cut up among the processes, and each block whole only while it is computed with.

By torch's own `fully_shard`, because Accelerate ignores its FSDP plug-in on a CPU without a word. What an adapter adds
stays whole in every process: it is small, its gradients are averaged as without FSDP, and rules that look at a whole
tensor (masks, thresholds, multipliers) see the same one everywhere. A method that trains the model itself has its
gradients and its optimiser's state cut up as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from peftcli.artifacts import lineage
from peftcli.config.errors import Mistake, UserError
from peftcli.config.schema import RunConfig
from peftcli.methods.contract import Method


def sharded(config: RunConfig) -> bool:
    """Whether the model is cut up among the processes."""
    return config.launch.strategy == "fsdp" and config.launch.world > 1


def check(method: Method, name: str) -> None:
    """Refuse a method that needs all of the base in one place.

    Raises:
        UserError: With the method's own reason.
    """
    if why := method.capabilities.whole_base:
        raise UserError(Mistake(f"method={name} does not train under launch.strategy=fsdp: {why}", "launch.strategy"))


def shard(model: nn.Module, method: Method, device: torch.device, world: int, offload: bool) -> int:
    """Cut the model's tensors up among all processes, and bring this one's parts to its device.

    Args:
        model: With the adapter in it, whole, on the CPU or on the device.
        method: What put it there.
        device: Where this process computes.
        world: Number of processes.
        offload: Parts wait in the CPU's memory, and a block comes to the device when its turn comes.

    Returns:
        How many parts the model works in: its blocks, and the rest.
    """
    whole = set() if method.saves == "model" else _added(model)
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    mesh = init_device_mesh(device.type, (world,))
    units = [*blocks(model), model]
    for unit in units:
        # The last one too: what is whole between two passes could be read, but a change to it would be lost.
        fully_shard(unit, mesh=mesh, offload_policy=policy, ignored_params=whole, reshard_after_forward=True)
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")
    for unit in units:
        unit.unshard()  # type: ignore[operator]  # makes its whole tensors, which inference mode may not be first to do
        unit.reshard()  # type: ignore[operator]
    return len(units)


def blocks(model: Any) -> list[nn.Module]:
    """What the model computes one after the other: the members of its outermost lists of modules."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found: dict[str, nn.Module] = {}
    for name, module in base.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(f"{one}." for one in found)):
            found |= {f"{name}.{place}": block for place, block in module.named_children()}
    return [block for block in found.values() if any(True for _ in block.parameters())]


def _added(model: nn.Module) -> set[nn.Parameter]:
    """What is trained, and what was not the base's."""
    base = {id(tensor) for tensor in lineage.base_tensors(model).values()}
    return {p for p in model.parameters() if p.requires_grad or id(p) not in base}


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within it the model's tensors can be read whole; a change to those that are cut up would be lost."""
    units: list[Any] = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; where it is cut up, every process has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_part(tensor: Tensor) -> bool:
    """Whether this process has a part of the tensor alone."""
    return isinstance(tensor, DTensor)


def part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, all of one that is not cut up."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensors(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The model's tensors on the CPU, whole, by their names in a file; empty where they are not to be kept.

    Every process has to come here.
    """
    named = ((name, whole(tensor.detach())) for name, tensor in model.state_dict().items())
    return {name: tensor.cpu() for name, tensor in named if keep}


def sizes(model: nn.Module) -> tuple[int, int]:
    """Bytes of all parameters in this process, and of the whole model."""
    parameters = list(model.parameters())
    return sum(part(p.detach()).nbytes for p in parameters), sum(p.numel() * p.element_size() for p in parameters)


def like(tensor: Tensor, values: Tensor) -> Tensor:
    """Whole values on a tensor's device, cut up as the tensor is."""
    values = values.to(tensor.device)
    if not isinstance(tensor, DTensor):
        return values
    return distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)


def average(parameters: list[nn.Parameter]) -> None:
    """Put the mean over all processes in the place of each gradient, in one message for each type of number."""
    for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
        same = [parameter for parameter in parameters if parameter.dtype == dtype]
        for parameter in same:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in same if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))
