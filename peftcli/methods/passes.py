"""What a model's forward passes are given and go through, and where two models' passes are compared.

B rows, L tokens, S supervised positions, V words or classes, N positions or rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftcli.methods.contract import UNLEARNT
from peftcli.models.positions import selected


@dataclass
class Pass:
    """What a forward pass was given and went through; `blocks` has inputs and outputs by name."""

    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    mask_BL: Tensor | None
    logits: Tensor
    blocks: dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]]


@dataclass(frozen=True)
class Places:
    """Where outputs are compared.

    Attributes:
        learnt_B: Rows with anything to learn.
        mask_BL: Positions that are learnt, where the task asks for scores at positions.
        attended_BL: Positions that are no padding, where rows are padded.
    """

    learnt_B: Tensor
    mask_BL: Tensor | None
    attended_BL: Tensor | None

    @classmethod
    def of(cls, seen: Pass, labels: Tensor) -> Places:
        """Of a pass over rows with these labels."""
        return cls((labels != UNLEARNT).flatten(1).any(1), seen.mask_BL, seen.inputs[1].get("attention_mask"))

    @property
    def count(self) -> Tensor:
        """Supervised positions."""
        return (self.learnt_B if self.mask_BL is None else self.mask_BL).sum()

    def logits(self, logits: Tensor) -> Tensor:
        """[S, V]."""
        return logits[self.learnt_B] if self.mask_BL is None else logits.reshape(-1, logits.shape[-1])

    def outputs(self, y: Tensor) -> Tensor:
        """[N, ...]: of the positions that are learnt, or of rows, padding as zeros."""
        if self.mask_BL is not None:
            return y[self.mask_BL]
        return (y if self.attended_BL is None else y * self.attended_BL[..., None])[self.learnt_B]


def hooked(model: Any, blocks: Sequence[str], keep: Callable[[Pass], Any], training: bool = False) -> Iterator[Any]:
    """Hooks that hand each of the model's passes on at its end; with `training` only those that learn."""
    now: dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = {}

    def wanted() -> bool:
        return not training or (model.training and torch.is_grad_enabled())

    def block(name: str) -> Callable[..., None]:
        def seen(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if wanted():
                now[name] = args, kwargs, first(output)

        return seen

    def end(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if wanted():
            # A block that is computed again in the backward pass is seen again, and forgotten with the next pass.
            keep(Pass((args, kwargs), selected(model), output.logits, dict(now)))
            now.clear()

    for name in blocks:
        yield model.get_submodule(name).register_forward_hook(block(name), with_kwargs=True)
    yield model.register_forward_hook(end, with_kwargs=True)


def first(output: Any) -> Tensor:
    """A block's hidden states, which some blocks give with more."""
    return output if isinstance(output, Tensor) else output[0]
