"""Who is where: a first all-reduce with a short limit, and a message that names the process the others wait for.

Each process writes where it is into the store in which the group has met. When a wait ends in vain, that is read: not
"timed out", but which process was last seen where.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from peftcli.config.errors import CheckFailed

SECONDS_BETWEEN = 1.0
"""Steps are noted at most so often."""
WAITED = ("timed out", "timeout", "connection closed by peer", "connection reset", "broken pipe", "socket")
"""What the backends of `torch.distributed` say when another process did not come, or is gone."""


class Places:
    """Where each process is, as it says itself.

    Args:
        rank: This process.
        world: How many there are; one has nobody to tell.
    """

    def __init__(self, rank: int, world: int):
        self.rank, self.world = rank, world
        self._store: Any = _get_default_store() if world > 1 else None
        self._told, self._at = 0.0, ""

    def at(self, place: str, often: bool = False) -> None:
        """Note where this process is; one that comes `often` is left out where the last was a moment ago."""
        now, self._at = time.monotonic(), place
        if self._store is None or (often and now - self._told < SECONDS_BETWEEN):
            return
        self._told = now
        self._store.set(_key(self.rank), f"{socket.gethostname()}, process {os.getpid()}: {place}")

    def told(self) -> list[str]:
        """What is known of every process, this one last."""
        others = [rank for rank in range(self.world) if rank != self.rank]
        lines = [f"rank {rank} ({self._of(rank)})" for rank in others]
        return [*lines, f"rank {self.rank} (here, process {os.getpid()}: {self._at})"]

    def _of(self, rank: int) -> str:
        # A key that is not there would be waited for.
        if self._store is None or not self._store.check([_key(rank)]):
            return "not heard of"
        return self._store.get(_key(rank)).decode()  # type: ignore[no-any-return]

    @contextmanager
    def named(self) -> Iterator[None]:
        """Within it a wait that ends in vain says who was where.

        Raises:
            CheckFailed: `waited`.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or not any(word in str(error).lower() for word in WAITED):
                raise
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> CheckFailed:
        try:
            places = "; ".join(self.told())
        except RuntimeError:  # the store is gone with the launcher
            places = f"rank {self.rank} (here: {self._at}); nothing is known of the others"
        said = str(error).strip().splitlines()[0][:160]
        return CheckFailed(
            "waited",
            f"the processes wait for one another in vain ({said}). Last seen: {places}",
            "the one at another place than the rest is the one to look at; launch.timeout_minutes says how long to wait",
        )


def _key(rank: int) -> str:
    return f"peftcli/place/{rank}"


def all_reduce(places: Places, device: torch.device, seconds: float) -> None:
    """Add a one from each process, before anything large is loaded.

    Args:
        places: Of this process.
        device: Where training will send its gradients from.
        seconds: How long to wait.

    Raises:
        CheckFailed: `waited`, or the sum is not the number of processes.
    """
    if places.world == 1:
        return
    places.at("the first all-reduce")
    ones = torch.ones(1, device=device)
    with places.named():
        work = dist.all_reduce(ones, async_op=True)
        assert work is not None
        work.wait(timedelta(seconds=seconds))
        total = int(ones.item())
    if total != places.world:
        raise CheckFailed("waited", f"{places.world} processes added a one each, and the sum is {total}")


def agree(places: Places, what: str, mine: str) -> None:
    """Compare something that must be the same everywhere.

    Args:
        places: Of this process.
        what: What it is, for the message.
        mine: This process's.

    Raises:
        CheckFailed: `ranks-differ`.
    """
    if places.world == 1:
        return
    found = [""] * places.world
    dist.all_gather_object(found, mine)
    odd = [rank for rank, one in enumerate(found) if one != found[0]]
    if odd:
        listed = ", ".join(f"rank {rank}: {one[:12]}" for rank, one in enumerate(found))
        raise CheckFailed(
            "ranks-differ",
            f"{what} differ between processes ({listed})",
            "each node must see the same files and the same versions: a folder that is not shared is the usual cause",
        )
