"""What can be rebuilt smaller, the ways to do it, and the tensors of each way.

| what | ways | worth |
| --- | --- | --- |
| Linear, 1x1 convolution | two factors of each rank below break-even | the outputs' energy on the data that is kept |
| convolution with a window | K filters and a 1x1, or Tucker-2 with P and Q inner channels | the same |
| attention without rotary positions | T dimensions a head | the energy of its q-k and of its v-o product |

Letters: O outputs, I inputs of a matrix (of a convolution its channels times its window), K rank, C second moment of
what goes in, D width of the model, G heads, S width of a head, T smaller width of a head, P and Q inner channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftcli.methods.rowcol import attention, convolution, maths, tucker
from peftcli.methods.rowcol.attention import Projections
from peftcli.methods.rowcol.moments import Moment
from peftcli.methods.rowcol.usage import EPS, Usage
from peftcli.models.compact.parts import Part

WIDE, STEP = 256, 8
"""Ranks of sides at least so wide are multiples of the step, which processors like."""


@dataclass(frozen=True)
class Way:
    """One way to have a layer smaller.

    Attributes:
        ranks: Of its factors, or the width of its heads.
        kept: Share of the energy that it keeps.
    """

    ranks: tuple[int, ...]
    kept: float


@dataclass(frozen=True)
class Extent:
    """At how many positions a layer computes for a batch.

    Attributes:
        before: Before its window and stride.
        after: After them.
        beside: FLOPs of an attention beside its four matrices.
    """

    before: float
    after: float
    beside: float = 0.0


class Rebuildable(ABC):
    """A module that can be had smaller.

    Attributes:
        name: Its full name.
        source: Name of the layer whose inputs are looked at.
        layer: That layer, as it was.
        maps: How many functions of the model it makes: what keeping all of it is worth.
        usage: How much of its spaces is used; None before `look`.
        ways: From `look`, without those that would make it larger.
    """

    maps = 1

    def __init__(self, name: str, source: str, layer: Any):
        self.name, self.source, self.layer = name, source, layer
        self.usage: Usage | None = None
        self.ways: list[Way] = []

    @property
    @abstractmethod
    def widest(self) -> int:
        """The largest rank that it could get."""

    @property
    def weights(self) -> list[nn.Parameter]:
        """Its matrices."""
        return [self.layer.weight]

    @abstractmethod
    def look(self, moment: Moment | None) -> None:
        """Find usage and ways from the moment of the inputs; without one all directions count alike."""

    @abstractmethod
    def sketch(self) -> None:
        """Find ways where there are no values, as if energies fell evenly."""

    @abstractmethod
    def parameters(self, ranks: Sequence[int]) -> int:
        """Numbers that it has with these ranks, or with none as it is; biases that stay are not counted."""

    @abstractmethod
    def operations(self, ranks: Sequence[int], extent: Extent) -> float:
        """FLOPs of a batch with these ranks, or with none as it is."""

    @abstractmethod
    def part(self, ranks: Sequence[int]) -> Part:
        """As `config.json` lists it."""

    @abstractmethod
    def tensors(self, ranks: Sequence[int], moment: Moment | None) -> dict[str, Tensor]:
        """The new module's tensors, in float64."""

    @abstractmethod
    def cut(self, ranks: Sequence[int]) -> list[tuple[nn.Parameter, Tensor]]:
        """The module's own parameters, and the values with which it computes what it would with these ranks."""


def steps(most: int, side: int) -> list[int]:
    """Ranks up to the largest, evenly spaced where the side is wide."""
    return list(range(STEP, most + 1, STEP)) if side >= WIDE else list(range(1, most + 1))


class Matrix(Rebuildable):
    """A linear layer or a convolution as the matrix [O, I]."""

    def __init__(self, name: str, layer: Any):
        super().__init__(name, name, layer)
        self.shape = (layer.weight.shape[0], layer.weight.shape[1:].numel())
        self._columns = torch.empty(0)
        self._centre: Tensor | None = None

    @property
    def widest(self) -> int:
        """See the base."""
        return maths.break_even(*self.shape)

    @property
    def weight(self) -> Tensor:
        """[O, I] in float64."""
        return maths.wide(self.layer.weight).flatten(1)

    def _seen(self, moment: Moment | None) -> tuple[Tensor | None, Tensor | None]:
        """C, and the mean input where there is a bias: that makes up for what a smaller matrix does to the mean."""
        if moment is None or self.layer.bias is None:
            return (None if moment is None else moment.mean), None
        return moment.mean - torch.outer(moment.centre, moment.centre), moment.centre

    def _bias(self, smaller_OI: Tensor) -> Tensor | None:
        """The bias [O] that goes with a smaller matrix."""
        if self.layer.bias is None:
            return None
        bias_O = maths.wide(self.layer.bias)
        return bias_O if self._centre is None else bias_O + (self.weight - smaller_OI) @ self._centre

    def look(self, moment: Moment | None) -> None:
        """See the base."""
        C, self._centre = self._seen(moment)
        U_OK, energies, into = maths.spaces(self.weight, C, self.widest)
        self._columns = U_OK.float().contiguous()  # of all layers at once
        whole = sum(energies) or 1.0
        rows, columns = maths.rank_for(into, 1 - EPS), maths.rank_for(energies, 1 - EPS)
        self.usage = Usage(self.shape[1], self.shape[0], rows, columns)
        self.ways = [Way((rank,), sum(energies[:rank]) / whole) for rank in steps(self.widest, min(self.shape))]

    def sketch(self) -> None:
        """See the base."""
        side = min(self.shape)
        self.ways = [Way((k,), 1 - (1 - k / side) ** 2) for k in steps(self.widest, side)]

    def parameters(self, ranks: Sequence[int]) -> int:
        """See the base."""
        outputs, inputs = self.shape
        return ranks[0] * (outputs + inputs) if ranks else outputs * inputs

    def operations(self, ranks: Sequence[int], extent: Extent) -> float:
        """See the base."""
        return 2 * extent.after * self.parameters(ranks)

    def part(self, ranks: Sequence[int]) -> Part:
        """See the base."""
        return {"kind": "factors", "ranks": list(ranks)}

    def tensors(self, ranks: Sequence[int], moment: Moment | None) -> dict[str, Tensor]:
        """See the base."""
        U_OK = self._columns[:, : ranks[0]].double()
        factors = maths.Factors(U_OK, U_OK.mT @ self.weight).balanced()
        kernel = self.layer.weight.shape[2:]
        reduce = factors.reduce.view(ranks[0], -1, *kernel)
        expand = factors.expand.view(*factors.expand.shape, *[1] * len(kernel))
        return self._named([reduce, expand], factors.product())

    def _named(self, kernels: Sequence[Tensor], smaller_OI: Tensor) -> dict[str, Tensor]:
        names = ("reduce", "expand") if len(kernels) == 2 else ("reduce", "core", "expand")
        named = {f"{name}.weight": kernel for name, kernel in zip(names, kernels, strict=True)}
        bias = self._bias(smaller_OI)
        return named if bias is None else named | {"expand.bias": bias}

    def cut(self, ranks: Sequence[int]) -> list[tuple[nn.Parameter, Tensor]]:
        """See the base."""
        U_OK = self._columns[:, : ranks[0]].double()
        smaller_OI = U_OK @ (U_OK.mT @ self.weight)
        changed = [(self.layer.weight, smaller_OI.view_as(self.layer.weight))]
        bias = self._bias(smaller_OI)
        return changed if bias is None else [*changed, (self.layer.bias, bias)]


class Window(Matrix):
    """A convolution with a window: as a matrix over patches, or by Tucker-2."""

    def look(self, moment: Moment | None) -> None:
        """See the base."""
        super().look(moment)
        C, _ = self._seen(moment)
        self.ways += [Way(ranks, kept) for ranks, kept in tucker.kept(maths.wide(self.layer.weight), C)]
        self.ways = [way for way in self.ways if self.parameters(way.ranks) < self.parameters(())]

    def parameters(self, ranks: Sequence[int]) -> int:
        """See the base."""
        if len(ranks) < 2:
            return super().parameters(ranks)
        outputs, inputs, *window = self.layer.weight.shape
        return convolution.tucker2_parameters(outputs, inputs, window[0] * window[1], ranks[1], ranks[0])

    def operations(self, ranks: Sequence[int], extent: Extent) -> float:
        """See the base."""
        if len(ranks) < 2:
            return super().operations(ranks, extent)
        first = self.layer.weight.shape[1] * ranks[0]
        return 2 * (extent.before * first + extent.after * (self.parameters(ranks) - first))

    def tensors(self, ranks: Sequence[int], moment: Moment | None) -> dict[str, Tensor]:
        """See the base."""
        if len(ranks) < 2:
            return super().tensors(ranks, moment)
        C, self._centre = self._seen(moment)
        reduce, core, expand = tucker.kernels(maths.wide(self.layer.weight), C, *ranks)
        smaller_OIHV = torch.einsum("oq,qphv,pi->oihv", expand.flatten(1), core, reduce.flatten(1))
        return self._named((reduce, core, expand), smaller_OIHV.flatten(1))


class Heads(Rebuildable):
    """An attention whose heads get fewer dimensions."""

    maps = 2

    def __init__(self, name: str, module: Any):
        super().__init__(name, f"{name}.q_proj", module.q_proj)
        self.q, self.k, self.v, self.o = (getattr(module, f"{one}_proj") for one in "qkvo")
        self.width: int = module.head_dim
        self.heads: int = self.q.out_features // self.width
        self._moment: Moment | None = None

    @property
    def widest(self) -> int:
        """See the base."""
        return self.width - 1

    @property
    def weights(self) -> list[nn.Parameter]:
        """See the base."""
        return [one.weight for one in (self.q, self.k, self.v, self.o)]

    @property
    def given(self) -> Projections:
        """The four matrices and their biases."""
        q, k, v, o = self.weights
        return Projections(q, k, v, o, self.q.bias, self.o.bias, self.v.bias)

    def look(self, moment: Moment | None) -> None:
        """See the base."""
        C = None if moment is None else moment.mean
        self._moment = moment
        q_k, v_o = (energies.tolist() for energies in attention.energies(self.given, self.heads, self._moment))
        every = [maths.wide(one.weight) for one in (self.q, self.k, self.v)]
        _, energies, into = maths.spaces(torch.cat(every), C, 1)
        rows, columns = maths.rank_for(into, 1 - EPS), maths.rank_for(energies, 1 - EPS)
        self.usage = Usage(self.q.in_features, min(len(every[0]) * 3, self.q.in_features), rows, columns)
        shares = [_shares(one) for one in (q_k, v_o)]
        self.ways = [Way((T,), (shares[0][T - 1] + shares[1][T - 1]) / 2) for T in range(1, self.width)]

    def sketch(self) -> None:
        """See the base."""
        self.ways = [Way((T,), 1 - (1 - T / self.width) ** 2) for T in range(1, self.width)]

    def parameters(self, ranks: Sequence[int]) -> int:
        """See the base."""
        matrices = sum(weight.numel() for weight in self.weights)
        if not ranks:
            return matrices + sum(one.bias.numel() for one in (self.q, self.k, self.v, self.o) if one.bias is not None)
        has_bias = self.o.bias is not None or self.v.bias is not None
        bias = self.heads * ranks[0] if self.q.bias is not None else 0
        return matrices * ranks[0] // self.width + bias + (self.o.out_features if has_bias else 0)

    def operations(self, ranks: Sequence[int], extent: Extent) -> float:
        """See the base."""
        matrices = sum(weight.numel() for weight in self.weights)
        return (2 * extent.after * matrices + extent.beside) * (ranks[0] / self.width if ranks else 1)

    def part(self, ranks: Sequence[int]) -> Part:
        """See the base."""
        return {"kind": "heads", "width": ranks[0]}

    def tensors(self, ranks: Sequence[int], moment: Moment | None) -> dict[str, Tensor]:
        """See the base."""
        found = attention.joint(self.given, self.heads, ranks[0], self._moment)
        named = {f"{one}_proj.weight": getattr(found, one) for one in "qkvo"}
        biases = {"q_proj.bias": found.q_bias, "o_proj.bias": found.o_bias}
        return named | {name: bias for name, bias in biases.items() if bias is not None}

    def cut(self, ranks: Sequence[int]) -> list[tuple[nn.Parameter, Tensor]]:
        """See the base."""
        found = attention.joint(self.given, self.heads, ranks[0], self._moment)
        changed = [(one.weight, self._padded(getattr(found, name), 0)) for name, one in self._rows]
        changed.append((self.o.weight, self._padded(found.o.mT, 0).mT))
        if found.q_bias is not None:
            changed.append((self.q.bias, self._padded(found.q_bias, 0)))
        if self.v.bias is not None and self.o.bias is not None:
            assert found.o_bias is not None
            changed += [(self.v.bias, torch.zeros_like(self.v.bias)), (self.o.bias, found.o_bias)]
        return changed

    @property
    def _rows(self) -> list[tuple[str, Any]]:
        return [("q", self.q), ("k", self.k), ("v", self.v)]

    def _padded(self, tensor: Tensor, dim: int) -> Tensor:
        """Each head's dimensions filled up with zeros."""
        heads = tensor.unflatten(dim, (self.heads, -1))
        missing = list(heads.shape)
        missing[dim + 1] = self.width - heads.shape[dim + 1]
        return torch.cat([heads, heads.new_zeros(missing)], dim + 1).flatten(dim, dim + 1)


def _shares(energies: Sequence[float]) -> list[float]:
    whole = sum(energies) or 1.0
    return [sum(energies[:place]) / whole for place in range(1, len(energies) + 1)]
