"""Bytes that a computation would hold, counted without holding them.

The computation runs on fake tensors: shapes, types and the device whose kernels are chosen, without contents. PyTorch
takes the same path as with real ones (autocast, fused attention, autograd, recomputation), and each storage it would
allocate is booked when it appears and struck out when it is let go.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

QUESTIONS = {"prim::device", "prim::layout"}
"""What fake tensors are asked for between two operations; nothing is allocated."""


class Ledger(TorchDispatchMode):
    """Books storages while it is the active mode; strikes them out whenever they go.

    Args:
        known: Tensors that are there already and cost nothing more.
        chosen: True values of every boolean mask that indexes a tensor: their number decides a shape, and a fake
            mask has none. None for real tensors.

    Attributes:
        live: Bytes held now.
        peak: The most bytes held at once.
    """

    def __init__(self, known: Iterable[torch.Tensor] = (), chosen: int | None = None):
        super().__init__()
        self.live = self.peak = 0
        self._chosen = chosen
        self._last: Any = None
        self._books: dict[int, tuple[weakref.ref, int]] = {}
        for tensor in known:
            self._book(tensor, free=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fake = self._chosen is not None
        if fake and func is torch.ops.aten._local_scalar_dense.default:
            # Tuners ask: is a number infinite (no), is a random one above a threshold (yes), what is a factor (one).
            return 0 if self._last is torch.ops.aten.any.default else 1
        if fake and func is torch.ops.aten.index.Tensor:
            args = (args[0], [part for index in args[1] for part in self._positions(index)])
        out = func(*args, **(kwargs or {}))
        if func._schema.name not in QUESTIONS:
            self._last = func
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self._book(leaf)
        return out

    def beyond(self, model: nn.Module) -> int:
        """Bytes held outside a model's parameters and buffers."""
        inside = {tensor.untyped_storage()._cdata for tensor in _tensors(model)}
        return sum(size for key, (_, size) in self._books.items() if key not in inside)

    def _positions(self, index: torch.Tensor | None) -> list[torch.Tensor | None]:
        if index is None or index.dtype is not torch.bool:
            return [index]
        count: Any = self._chosen
        return [torch.empty(count, dtype=torch.long, device=index.device) for _ in range(index.dim())]

    def _book(self, tensor: torch.Tensor, free: bool = False) -> None:
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._books:
            return
        size = 0 if free else storage.nbytes()

        def strike(_: weakref.ref) -> None:
            del self._books[key]
            self.live -= size

        self._books[key] = weakref.ref(storage, strike), size
        self.live += size
        self.peak = max(self.peak, self.live)


def held_by(model: nn.Module) -> dict[torch.dtype, int]:
    """Bytes of a model's parameters and buffers by type; what several of them share counts once."""
    seen: dict[int, tuple[torch.dtype, int]] = {}
    for tensor in _tensors(model):
        storage = tensor.untyped_storage()
        seen[storage._cdata] = (tensor.dtype, storage.nbytes())
    found: dict[torch.dtype, int] = {}
    for dtype, size in seen.values():
        found[dtype] = found.get(dtype, 0) + size
    return found


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


@contextmanager
def pretending(models: Iterable[nn.Module], device: str) -> Iterator[None]:
    """Within it models of the meta device have fake tensors on a device, as do all tensors that are made there."""
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            made[id(tensor)] = empty
        return made[id(tensor)]

    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        for module in chain.from_iterable(model.modules() for model in models):
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = fake(tensor)  # type: ignore[assignment]
        yield
