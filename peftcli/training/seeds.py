"""Random streams by name: initialisation, data order and dropout never share a generator.

A stream is a pure function of the run's seed and the names, so that a resumed run needs no saved generator state.
"""

from __future__ import annotations

import hashlib


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream called `names`, e.g. `derive(0, "dropout", step, rank)`."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def start(seed: int, *names: str | int) -> None:
    """Point PyTorch's global generators at the stream called `names`."""
    import torch

    torch.manual_seed(derive(seed, *names))
