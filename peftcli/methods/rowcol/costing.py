"""What a layer costs in each of its sizes: in parameters, in operations, or in seconds on this machine.

The backbone is the model without its embeddings and its head. What of it cannot be rebuilt is held in any case.
"""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from peftcli.methods.rowcol.rebuilding import Extent, Rebuildable
from peftcli.models import roles
from peftcli.models.compact.parts import KINDS
from peftcli.models.family import Family

OUTSIDE = ("embed", "head")
"""Roles that are no part of the backbone."""
INPUTS = ("pixel_values", "input_ids", "attention_mask")
ROWS = 8
"""Rows that layers are timed with, at most."""
SIZES = 5
"""Sizes of a kind that are timed; between them time goes by operations."""
WARM_UP, RUNS = 2, 9


class Cost(ABC):
    """A unit to count in.

    Attributes:
        unit: Its name, as a recipe has it.
        whole: Of the backbone as it is.
        held: Of what stays as it is.
    """

    unit = ""

    def __init__(self, whole: float, things: Sequence[Rebuildable]):
        self.whole = whole
        self.held = max(0.0, whole - sum(self.of(thing, ()) for thing in things))

    @abstractmethod
    def of(self, thing: Rebuildable, ranks: Sequence[int]) -> float:
        """Of a layer with these ranks, or with none as it is."""

    @abstractmethod
    def said(self, amount: float) -> str:
        """An amount for people."""


class Parameters(Cost):
    """Numbers."""

    unit = "parameters"

    def __init__(self, model: nn.Module, family: Family, things: Sequence[Rebuildable]):
        super().__init__(backbone(model, family), things)

    def of(self, thing: Rebuildable, ranks: Sequence[int]) -> float:
        """See the base."""
        return thing.parameters(ranks)

    def said(self, amount: float) -> str:
        """See the base."""
        return f"{amount:,.0f} parameters"


class Operations(Cost):
    """FLOPs of one row in matrix products and convolutions."""

    unit = "flops"

    def __init__(self, model: nn.Module, family: Family, things: Sequence[Rebuildable], batch: Mapping[str, Tensor]):
        one = _rows(batch, 1)
        self._extents = _extents(model, things, one)
        counted = _counted(model, one)
        for thing in things:
            if thing.name != thing.source:
                beside = counted[thing.name] - thing.operations((), self._extents[thing.name])
                self._extents[thing.name] = replace(self._extents[thing.name], beside=beside)
        outside = [name for name, _ in model.named_modules() if roles.role_of(name, family) in OUTSIDE]
        outermost = [name for name in outside if not any(name.startswith(f"{one}.") for one in outside)]
        super().__init__(counted[""] - sum(counted[name] for name in outermost), things)

    def of(self, thing: Rebuildable, ranks: Sequence[int]) -> float:
        """See the base."""
        return thing.operations(ranks, self._extents[thing.name])

    def said(self, amount: float) -> str:
        """See the base."""
        return f"{amount / 1e6:,.4g} million operations a row"


class Latency(Cost):
    """Seconds of a forward pass on this machine, embeddings and head included.

    Attributes:
        table: Seconds by layer shape and ranks, as they were measured.
    """

    unit = "latency"

    def __init__(self, model: nn.Module, things: Sequence[Rebuildable], batch: Mapping[str, Tensor]):
        some = _rows(batch, ROWS)
        self.table: dict[str, dict[str, float]] = {}
        self._extents = _extents(model, things, some)
        self._shapes: dict[str, str] = {}
        with torch.no_grad(), _evaluating(model), _calls(model, things) as calls:
            model(**some)
            whole = _seconds(lambda: model(**some))
        for thing in things:
            module = model.get_submodule(thing.name)
            shape = self._shapes[thing.name] = f"{module!r} {_shape(calls[thing.name])}"
            if shape not in self.table:
                self.table[shape] = _timed(module, thing, calls[thing.name], self._extents[thing.name])
        super().__init__(whole, things)

    def of(self, thing: Rebuildable, ranks: Sequence[int]) -> float:
        """See the base."""
        found = self.table[self._shapes[thing.name]]
        if not ranks:
            return found[""]
        extent, kind = self._extents[thing.name], len(ranks)
        sizes = [tuple(map(int, key.split(","))) for key in found if key and key.count(",") == kind - 1]
        points = sorted((thing.operations(size, extent), found[",".join(map(str, size))]) for size in sizes)
        times = list(accumulate((seconds for _, seconds in points), max))
        return _between([operations for operations, _ in points], times, thing.operations(ranks, extent))

    def said(self, amount: float) -> str:
        """See the base."""
        return f"{1e3 * amount:,.3g} ms"


def backbone(model: nn.Module, family: Family) -> int:
    """Numbers of the model without embeddings and head."""
    return sum(p.numel() for name, p in model.named_parameters() if roles.role_of(name, family) not in OUTSIDE)


def inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a batch that the model is called with."""
    return {name: tensor for name, tensor in batch.items() if name in INPUTS}


def _rows(batch: Mapping[str, Tensor], most: int) -> dict[str, Tensor]:
    return {name: tensor[:most] for name, tensor in inputs(batch).items()}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


@contextmanager
def _calls(model: nn.Module, things: Sequence[Rebuildable]) -> Iterator[dict[str, tuple[Any, Any]]]:
    """What each module is called with, within."""
    found: dict[str, tuple[Any, Any]] = {}

    def keeper(name: str) -> Any:
        return lambda _, arguments, named: found.__setitem__(name, (arguments, named))

    hooks = [
        model.get_submodule(thing.name).register_forward_pre_hook(keeper(thing.name), with_kwargs=True)
        for thing in things
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _extents(model: nn.Module, things: Sequence[Rebuildable], batch: dict[str, Tensor]) -> dict[str, Extent]:
    """How many positions each layer reads and writes with all rows of the batch."""
    found: dict[str, Extent] = {}

    def counter(name: str, layer: Any) -> Any:
        inner, outer = layer.weight.shape[1], layer.weight.shape[0]
        return lambda _, arguments, out: found.__setitem__(
            name, Extent(arguments[0].numel() / inner, out.numel() / outer)
        )

    hooks = [thing.layer.register_forward_hook(counter(thing.name, thing.layer)) for thing in things]
    try:
        with _evaluating(model):
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def _counted(model: nn.Module, batch: dict[str, Tensor]) -> defaultdict[str, float]:
    """FLOPs of each module by its name, and of all under the empty name."""
    with _evaluating(model), FlopCounterMode(display=False) as counter:
        model(**batch)
    found: defaultdict[str, float] = defaultdict(float, {"": counter.get_total_flops()})
    for name, counts in counter.get_flop_counts().items():
        found[name.partition(".")[2]] += sum(counts.values()) if "." in name else 0
    return found


@torch.no_grad()
def _timed(module: nn.Module, thing: Rebuildable, call: tuple[Any, Any], extent: Extent) -> dict[str, float]:
    """Seconds of a module as it is, and of a few of its sizes of each kind."""
    arguments, named = call
    found = {"": _seconds(lambda: module(*arguments, **named))}
    for kind in {len(way.ranks) for way in thing.ways}:
        sizes = sorted(
            (way.ranks for way in thing.ways if len(way.ranks) == kind), key=lambda r: thing.operations(r, extent)
        )
        for place in {round(i * (len(sizes) - 1) / (SIZES - 1)) for i in range(SIZES)}:
            ranks = sizes[place]
            smaller = KINDS[thing.part(ranks)["kind"]](None, copy.deepcopy(module), thing.part(ranks)).eval()
            found[",".join(map(str, ranks))] = _seconds(lambda smaller=smaller: smaller(*arguments, **named))
    return found


def _seconds(run: Any) -> float:
    """The median of a few runs."""
    taken = []
    for turn in range(WARM_UP + RUNS):
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if turn >= WARM_UP:
            taken.append(time.perf_counter() - began)
    return median(taken)


def _between(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """y at x on the line through the points, whose ends go on to the origin and level."""
    place = bisect_left(xs, x)
    if place == len(xs):
        return ys[-1]
    left_x, left_y = (xs[place - 1], ys[place - 1]) if place else (0.0, 0.0)
    share = (x - left_x) / (xs[place] - left_x) if xs[place] > left_x else 1.0
    return left_y + share * (ys[place] - left_y)


def _shape(call: tuple[Any, Any]) -> list[tuple[int, ...]]:
    arguments, named = call
    return [tuple(one.shape) for one in (*arguments, *named.values()) if isinstance(one, Tensor)]
