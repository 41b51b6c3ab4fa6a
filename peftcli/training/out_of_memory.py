"""When memory runs out: a named check instead of a traceback, and the changes that cost least."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from peftcli.config.errors import CheckFailed
from peftcli.config.schema import ImageConfig, RunConfig

ALLOCATOR = ("can't allocate memory", "not enough memory", "out of memory")
"""What PyTorch's CPU and GPU allocators say in a plain RuntimeError."""
MOST = 3


@dataclass(frozen=True)
class Change:
    """A change to a recipe that saves memory."""

    overrides: tuple[str, ...]
    cost: str
    """What it costs beside the memory it saves."""
    config: RunConfig

    def __str__(self) -> str:
        return f"{' '.join(self.overrides)} ({self.cost})"


def changes(config: RunConfig) -> list[Change]:
    """At most three changes that this recipe has not made yet, the cheapest first."""
    return candidates(config)[:MOST]


def candidates(config: RunConfig) -> list[Change]:
    """Changes that this recipe has not made yet, the cheapest first; whether one saves memory depends on the recipe."""
    training, model, task = config.training, config.model, config.task
    rows = training.micro_batch_size or -(-training.batch_size // config.launch.world)
    found = []
    if rows > 1:
        fewer = replace(training, micro_batch_size=rows // 2)
        cost = "the same result, in more parts"
        found.append(_change(config, cost, ("training.micro_batch_size", rows // 2), training=fewer))
    if not training.gradient_checkpointing:
        again = replace(training, gradient_checkpointing=True)
        cost = "the same result, about a third more time"
        found.append(_change(config, cost, ("training.gradient_checkpointing", "true"), training=again))
    if training.precision == "fp32" or model.dtype == "float32":
        short = {"training": replace(training, precision="bf16"), "model": replace(model, dtype="bfloat16")}
        both = (("training.precision", "bf16"), ("model.dtype", "bfloat16"))
        found.append(_change(config, "numbers of eight bits", *both, **short))
    if config.method.name == "full":
        from peftcli.config.catalog import settings_class

        cost = "a small part of the parameters is trained"
        found.append(_change(config, cost, ("method", "lora"), method=settings_class("lora")()))
    if not isinstance(task, ImageConfig) and task.max_length > 64:
        cut = replace(task, max_length=task.max_length // 2)
        found.append(_change(config, "longer rows are cut", ("task.max_length", task.max_length // 2), task=cut))
    return found


def smaller_adapter(config: RunConfig, share: float) -> list[Change]:
    """A smaller `method.r`, a power of two of at most `share` of what it is; nothing for a method without or at one."""
    r = getattr(config.method, "r", None)
    if not isinstance(r, int) or r < 2:
        return []
    fewer = max(1, min(r // 2, int(r * share)))
    fewer = 1 << (fewer.bit_length() - 1)
    smaller = replace(config.method, r=fewer)
    return [_change(config, "the adapter can learn less", ("method.r", fewer), method=smaller)]


def _change(config: RunConfig, cost: str, *values: tuple[str, Any], **groups: Any) -> Change:
    return Change(tuple(f"{key}={value}" for key, value in values), cost, replace(config, **groups))


@contextmanager
def named(config: RunConfig) -> Iterator[None]:
    """Within it, running out of memory is a failed check that names the cheapest changes.

    Raises:
        CheckFailed: `out-of-memory`.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        sure = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not sure and not any(words in str(error) for words in ALLOCATOR):
            raise
        said = str(error).strip().splitlines()
        hint = "what costs least: " + "; ".join(map(str, changes(config)))
        what = "the machine has no more memory to give" + (f" ({said[0][:200]})" if said else "")
        raise CheckFailed("out-of-memory", what, hint) from error
