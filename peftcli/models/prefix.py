"""The frozen beginning of a model of pictures: where it ends, what it makes of a picture, and a way in behind it.

`*` is the shape of one row's hidden state at that place; B rows of a batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.modeling_outputs import ImageClassifierOutput

from peftcli.models import batch_norm
from peftcli.models.family import Family


class Nowhere(Exception):
    """The model has no beginning that could be left out; says why."""


@dataclass(frozen=True)
class Cut:
    """A place in a model that only frozen parts come before.

    Attributes:
        model: The Transformers model, with its head.
        place: Full name of the module that reads the hidden state there.
        at: That module.
        skipped: What comes before it, if it is a block: each module reads what the one before it puts out. Empty where
            it is the head.
        shape: `*`.
        dtype: Of the hidden state.
        layout: In memory; which units dropout takes depends on it.
        before: In words, what comes before it.
    """

    model: nn.Module
    place: str
    at: nn.Module
    skipped: tuple[nn.Module, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: torch.memory_format
    before: str

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of all that comes before it."""
        parts = self.skipped or [part for part in self.model.children() if part is not self.at]
        named = [(f"{i}.{name}", t) for i, part in enumerate(parts) for name, t in _tensors(part)]
        return dict(named)

    def takes(self, given: Any) -> bool:
        """Whether this is hidden states [B, *] rather than pictures."""
        return isinstance(given, Tensor) and given.shape[1:] == self.shape and given.dtype == self.dtype


@dataclass
class _Call:
    read: Tensor | None
    drew: bool
    gave: Tensor | None = None


def find(model: nn.Module, family: Family, pixels_BCSS: Tensor) -> Cut:
    """The last place with nothing trained, no dropout and no moving BatchNorm before it: a block, or the head.

    Args:
        model: With what is trained requiring a gradient.
        family: Its family.
        pixels_BCSS: A picture or two, to see in which order modules are called.

    Raises:
        Nowhere: There is none behind the first block, or the model gives other outputs when it is entered there.
    """
    calls = _trace(model, pixels_BCSS)
    order = {name: place for place, name in enumerate(calls)}
    block = re.compile(rf"(?:.*\.)?(?:{family.blocks})") if family.blocks else None
    blocks = [name for name in calls if block and block.fullmatch(name)]
    heads = [name for name in calls if family.pattern("head").fullmatch(name)][:1]
    trained = [_called(name, order) for name, p in model.named_parameters() if p.requires_grad]
    moving = [name for name in batch_norm.awake(model) if name in order]
    first = min((order[name] for name in (*trained, *moving)), default=len(order))
    free = [name for name in (*blocks, *heads) if order[name] <= first]
    still = [name for name in free if not calls[name].drew]
    if not blocks or not heads:
        raise Nowhere(f"the blocks of {family.name} models are not known here")
    if not still or still[-1] == blocks[0]:
        earliest = list(calls)[first].removeprefix("base_model.model.") or "the model"
        trained_early = f"{earliest} is trained, and there is no whole block before it"
        raise Nowhere("there is dropout in the first block, or before it" if len(free) > 1 else trained_early)
    place = still[-1]
    if place in heads:
        parent, skipped, before = place.rpartition(".")[0], [], f"all {len(blocks)} blocks"
    else:
        parent = heads[0].rpartition(".")[0]
        skipped = _chain(calls, blocks[: blocks.index(place) + 1])
        before = f"blocks 0-{blocks.index(place) - 1} of {len(blocks)}"
    state = calls[place].read
    if state is None:
        raise Nowhere(f"{place} reads no tensor")
    parts = tuple(model.get_submodule(name) for name in skipped)
    inner, at = model.get_submodule(parent), model.get_submodule(place)
    last = state.ndim == 4 and state.is_contiguous(memory_format=torch.channels_last) and not state.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    cut = Cut(inner, place, at, parts, tuple(state.shape[1:]), state.dtype, layout, before)
    _try(model, cut, pixels_BCSS)
    return cut


@torch.no_grad()
def _try(model: nn.Module, cut: Cut, pixels_BCSS: Tensor) -> None:
    modes = {module: module.training for module in model.modules()}
    state = hidden(cut, pixels_BCSS)
    model.eval()
    try:
        whole_BK = model(pixel_values=pixels_BCSS).logits
        with entered(cut):
            short_BK = model(pixel_values=state).logits
    finally:
        _put_back(modes)
    if not torch.equal(whole_BK, short_BK):
        raise Nowhere(f"the model computes something else when it is entered at {cut.place}")


def _called(parameter: str, order: dict[str, int]) -> str:
    """The innermost module around a parameter that is called at all."""
    name = parameter.rpartition(".")[0]
    while name and name not in order:
        name = name.rpartition(".")[0]
    return name


def _chain(calls: dict[str, _Call], blocks: list[str]) -> list[str]:
    """What makes the first block's input, and all of these blocks but the last; each reads what the former gave.

    Raises:
        Nowhere: Something else is done between them.
    """
    for one, next_one in pairwise(blocks):
        if calls[one].gave is not calls[next_one].read:
            raise Nowhere(f"{next_one} does not read what {one} puts out")
    makers = [name for name, call in calls.items() if call.gave is not None and call.gave is calls[blocks[0]].read]
    if not makers:
        raise Nowhere(f"no single module makes what {blocks[0]} reads")
    return [min(makers, key=len), *blocks[:-1]]


def _trace(model: nn.Module, pixels_BCSS: Tensor) -> dict[str, _Call]:
    """The modules in the order in which they are first called in training, with what they read and gave, and whether
    random numbers were drawn before."""
    calls: dict[str, _Call] = {}
    modes = {module: module.training for module in model.modules()}
    device = pixels_BCSS.device
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.callback(_put_back, modes)
        model.train()
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        start = _drawn(device)

        def enter(name: str) -> Callable:
            def hook(module, args, kwargs):
                calls.setdefault(name, _Call(_first(args, kwargs), not torch.equal(start, _drawn(device))))

            return hook

        def leave(name: str) -> Callable:
            def hook(module, args, kwargs, output):
                calls[name].gave = _first(output if isinstance(output, tuple | list) else (output,), {})

            return hook

        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(enter(name), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave(name), with_kwargs=True).remove)
        with torch.no_grad():
            model(pixel_values=pixels_BCSS)
    return calls


def _put_back(modes: dict[nn.Module, bool]) -> None:
    for module, mode in modes.items():
        module.training = mode


def _drawn(device: torch.device) -> Tensor:
    """The state of the generator that dropout draws from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _first(args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    found = args[0] if args else kwargs.get("hidden_states")
    return found if isinstance(found, Tensor) else None


def _tensors(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from part.named_parameters()
    yield from part.named_buffers()


class _Reached(Exception):
    """The hidden state is there; what comes after it is not needed."""


@torch.no_grad()
def hidden(cut: Cut, pixels_BCSS: Tensor) -> Tensor:
    """What the frozen beginning makes of pictures: [B, *], in the type that it has in training."""
    found: list[Tensor] = []

    def stop(module, args, kwargs):
        state = _first(args, kwargs)
        assert state is not None
        found.append(state)
        raise _Reached

    hook = cut.at.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        cut.model(pixel_values=pixels_BCSS)
    except _Reached:
        pass
    finally:
        hook.remove()
    return found[0].detach()


@contextmanager
def entered(cut: Cut) -> Iterator[None]:
    """Within it the model also takes hidden states [B, *] as `pixel_values` and begins with them at the cut; pictures
    go the whole way as ever."""
    whole: Callable = cut.model.forward

    def behind(pixel_values: Tensor, **more: Any) -> Any:
        if not cut.takes(pixel_values):
            return whole(pixel_values=pixel_values, **more)
        state = pixel_values.contiguous(memory_format=cut.layout)
        if not cut.skipped:
            return ImageClassifierOutput(logits=cut.at(state))
        with ExitStack() as stack:
            # The first gives the states as they are: the model may cast what it takes for pictures.
            stack.enter_context(_replaced(cut.skipped[0], lambda *_, **__: state))
            for block in cut.skipped[1:]:
                stack.enter_context(_replaced(block, _first_of))
            return whole(pixel_values=pixel_values, **more)

    with _replaced(cut.model, behind):
        yield


def _first_of(*args: Any, **kwargs: Any) -> Tensor | None:
    return _first(args, kwargs)


@contextmanager
def _replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]
