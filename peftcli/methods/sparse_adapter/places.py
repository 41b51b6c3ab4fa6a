"""Where modules go: from a recipe's targets to modules of the base, and what each of those reads and puts out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from peftcli.config.errors import Mistake, UserError
from peftcli.methods.sparse_adapter import maths
from peftcli.models import roles
from peftcli.models.family import Family

ENDS = {"attention": "attention.o", "mlp": "mlp.down", "ssm": "ssm.out"}
"""The role of the linear layer that ends a part of a block; the block adds its output to what it carries along."""
BLOCK = "block"


@dataclass(frozen=True)
class Geometry:
    """What a module of the base reads and puts out.

    Attributes:
        inputs: Channels in.
        outputs: Channels out.
        stride: Of a convolution, by height and width; None where channels come last.
    """

    inputs: int
    outputs: int
    stride: tuple[int, int] | None = None


def resolve(
    model: nn.Module, family: Family, targets: Iterable[str], placement: str, linear: bool, last_blocks: int | float
) -> list[str]:
    """Full names of the modules of the base that get one, in the model's order.

    Args:
        model: The untouched base.
        family: Its family.
        targets: As `Settings.targets`.
        placement: `sequential`: at the layer that ends a place; `parallel`: around the place as a whole.
        linear: The modules are linear: at a whole block they go onto its last layer, where they can be merged.
        last_blocks: As `Settings.last_blocks`.

    Raises:
        CheckFailed: `dead-target`.
        UserError: A target lies within another one, the family's blocks are unknown and asked for, or a module is of
            a kind that takes none.
    """
    chosen: set[str] = set()
    for target in list(targets) or usual(family):
        chosen |= set(_names(model, family, target, placement, linear))
    names = [name for name, _ in model.named_modules() if name in chosen]
    for name in names:
        if inner := next((other for other in names if other.startswith(f"{name}.")), None):
            raise UserError(
                Mistake(
                    f"method.targets means {name} and, within it, {inner}",
                    hint="a module within another would read its own outputs twice: choose one of them",
                )
            )
        geometry(model.get_submodule(name))
        if placement == "parallel":
            _check_beside(name, model.get_submodule(name))
    return _last(names, family, last_blocks)


def _check_beside(name: str, module: nn.Module) -> None:
    """Raises UserError where strides alone do not give what a part of a ResNet puts out."""
    path = getattr(module, "layer", module)
    inside = list(path.modules())
    wide = [m for m in inside if isinstance(m, nn.Conv2d) and not _keeps_size(m)]
    pools = [m for m in inside if isinstance(m, nn.MaxPool2d | nn.AvgPool2d)]
    blocks = [m for m in inside[1:] if hasattr(m, "layer")]
    if odd := [*wide, *pools, *blocks]:
        what = f"no module can stand beside {name}: there is a {type(odd[0]).__name__} in it, and sizes would differ"
        raise UserError(
            Mistake(what, "method.placement", hint="add method.placement=sequential, or name other targets")
        )


def _keeps_size(convolution: nn.Conv2d) -> bool:
    """Whether its output has as many pixels as its input, but for the stride."""
    reach = [step * (size - 1) for step, size in zip(convolution.dilation, convolution.kernel_size, strict=True)]
    return convolution.padding == "same" or list(convolution.padding) == [r // 2 for r in reach]


def usual(family: Family) -> list[str]:
    """The places a family has."""
    return [place for place, role in ENDS.items() if role in family.roles] or [BLOCK]


def _names(model: nn.Module, family: Family, target: str, placement: str, linear: bool) -> list[str]:
    if target in ENDS and ENDS[target] in family.roles:
        ends = roles.resolve(model, family, [ENDS[target]])
        return ends if placement == "sequential" else list(dict.fromkeys(end.rpartition(".")[0] for end in ends))
    if target != BLOCK:
        return roles.resolve(model, family, [target])
    found = list(dict.fromkeys(block for name, _ in model.named_modules() if (block := block_of(name, family))))
    if not found:
        what = f"method.targets has {BLOCK!r}, and the blocks of {family.name} models are not known here"
        raise UserError(Mistake(what, hint="name modules, or roles: peft ls models"))
    return [_end(model, block) for block in found] if linear and placement == "sequential" else found


def block_of(name: str, family: Family) -> str:
    """The block that a module is or lies in; empty outside of all."""
    match = re.match(rf"(?:.*\.)?(?:{family.blocks})(?=\.|$)", name) if family.blocks else None
    return match.group() if match else ""


def _end(model: nn.Module, block: str) -> str:
    """The last linear layer or convolution on a block's main path."""
    prefix = f"{block}.layer" if hasattr(model.get_submodule(block), "layer") else block
    ends = [n for n, m in model.get_submodule(prefix).named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    if not ends:
        raise UserError(Mistake(f"{block} has neither a linear layer nor a convolution"))
    return f"{prefix}.{ends[-1]}"


def last(names: Iterable[str], family: Family, count: int | float) -> set[str]:
    """Those that lie in the last blocks that have any of them, and those outside of all blocks."""
    names = list(names)
    blocks = list(dict.fromkeys(block for name in names if (block := block_of(name, family))))
    late = {"", *blocks[len(blocks) - maths.amount(count, len(blocks)) :]} if blocks else {""}
    return {name for name in names if block_of(name, family) in late}


def _last(names: list[str], family: Family, count: int | float) -> list[str]:
    if count != 1.0 or isinstance(count, int):
        if not family.blocks:
            what = f"method.last_blocks={count}, and the blocks of {family.name} models are not known here"
            raise UserError(Mistake(what, hint="add method.last_blocks=1.0, and name the modules in method.targets"))
        late = last(names, family, count)
        return [name for name in names if name in late]
    return names


def geometry(module: Any) -> Geometry:
    """What a module of the base reads and puts out: a linear layer, a convolution, or a larger part with some inside.

    A part of a transformer or a Mamba reads and puts out what its last linear layer does; a part of a ResNet reads
    what its first convolution does, and its strides multiply.

    Raises:
        UserError: There is neither in it.
    """
    module = getattr(module, "base_layer", module)
    if isinstance(module, nn.Linear):
        return Geometry(module.in_features, module.out_features)
    path = getattr(module, "layer", module)
    convolutions = [m for m in path.modules() if isinstance(m, nn.Conv2d)]
    if convolutions:
        high, wide = (math.prod(int(m.stride[axis]) for m in convolutions) for axis in (0, 1))
        return Geometry(convolutions[0].in_channels, convolutions[-1].out_channels, (high, wide))
    if linears := [m for m in path.modules() if isinstance(m, nn.Linear)]:
        return Geometry(linears[-1].out_features, linears[-1].out_features)
    raise UserError(
        Mistake(
            f"no sparse adapter can be put at a {type(module).__name__}: it is neither a linear layer nor a "
            "convolution, and has none in it",
            "method.targets",
        )
    )
