"""How much memory this process holds and has held, in bytes."""

from __future__ import annotations

import resource
import sys

import psutil
import torch


def held(device: torch.device) -> int:
    """Bytes held now: on a GPU what its allocator holds, else the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def peak(device: torch.device) -> int:
    """The most bytes held since the process started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
