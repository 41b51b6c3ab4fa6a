"""Which entries of a mask cover which weights. K entries over all weights, M experts, P the shape of a weight.

A structured mask has an entry for each column of a matrix (an input of a linear layer, a number of an embedding), for
each output channel of a convolution, and for each entry of a vector.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from peftcli.config.errors import CheckFailed

UNUSED = ("mask_token", "inv_freq")
"""Last parts of names of parameters that no forward pass for features reads."""


@dataclass(frozen=True)
class Layout:
    """Where the mask of each weight is among all K entries.

    Attributes:
        shapes: Of the weights, by name.
        masks: Shape of each one's mask, which broadcasts to the weight's.
    """

    shapes: dict[str, tuple[int, ...]]
    masks: dict[str, tuple[int, ...]]

    @property
    def sizes(self) -> list[int]:
        """Entries of each weight's mask; together K."""
        return [math.prod(shape) for shape in self.masks.values()]

    @property
    def entries(self) -> int:
        """K."""
        return sum(self.sizes)

    def counts(self) -> Tensor:
        """How many weights each entry covers, [K] float64."""
        each = [math.prod(self.shapes[name]) / size for name, size in zip(self.masks, self.sizes, strict=True)]
        sizes = torch.tensor(self.sizes)
        return torch.tensor(each, dtype=torch.float64).repeat_interleave(sizes, output_size=self.entries)

    def gates(self, gate_K: Tensor) -> dict[str, Tensor]:
        """Parts of `gate_K`, each in the shape of a weight's mask, by name."""
        parts = gate_K.split(self.sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self.masks.items(), parts, strict=True)}


def layout(shapes: Mapping[str, tuple[int, ...]], convolutions: Iterable[str], structured: bool) -> Layout:
    """The masks of weights.

    Args:
        shapes: By name.
        convolutions: Names among them of a convolution's kernels.
        structured: Else there is an entry for each weight.
    """
    kernels = set(convolutions)

    def of(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if not structured or len(shape) < 2:
            return shape
        kept = 0 if name in kernels else len(shape) - 1
        return tuple(size if place == kept else 1 for place, size in enumerate(shape))

    return Layout(dict(shapes), {name: of(name, shape) for name, shape in shapes.items()})


def weights_of(model: nn.Module, modules: Iterable[str] | None = None) -> dict[str, nn.Parameter]:
    """Parameters to be changed: all floating ones that are used, or those of some modules; a shared one once.

    Raises:
        CheckFailed: `dead-target`: the modules have none.
    """
    inside = None if modules is None else tuple(f"{name}." for name in modules)
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
        and name.rpartition(".")[2] not in UNUSED
        and (inside is None or name.startswith(inside))
    }
    if not found:
        raise CheckFailed("dead-target", "the targets have no weights to change", "name layers, such as attention")
    return found


def convolutions(model: nn.Module) -> set[str]:
    """Names of the kernels of convolutions."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, _ConvNd)}
